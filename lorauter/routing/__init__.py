"""Routing: from a query to a weighted mixture of adapters."""

from lorauter.routing.compose import AdapterWeight, LeftOut, RoutingDecision, TaskScore, compose
from lorauter.routing.options import RoutingConfig, RoutingOptions
from lorauter.routing.retrieve import AdapterUtility, Retrieved, RetrievedTask, Retriever
from lorauter.routing.router import Router, check_text

__all__ = [
    "AdapterUtility",
    "AdapterWeight",
    "LeftOut",
    "Retrieved",
    "RetrievedTask",
    "Retriever",
    "Router",
    "RoutingConfig",
    "RoutingDecision",
    "RoutingOptions",
    "TaskScore",
    "check_text",
    "compose",
]
