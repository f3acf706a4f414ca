"""Adapters composed from others: one weight for each source and layer, fitted to a task's few examples.

Fitting and writing need torch, transformers and safetensors alone.
"""
