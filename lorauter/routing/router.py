"""The router in one process: embed, retrieve, compose.

`deployments` runs the same three steps as separate services. Knows nothing of engines or adapters' weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorauter.catalog.build import probed
from lorauter.catalog.catalog import Catalog
from lorauter.encoder import Encoder
from lorauter.errors import InvalidRequest
from lorauter.routing.compose import RoutingDecision, compose
from lorauter.routing.options import RoutingConfig, RoutingOptions
from lorauter.routing.retrieve import Retriever
from lorauter.states import StateModel
from lorauter.tasks import is_encodable


class Router:
    """Decides which adapters answer a query.

    Args:
        states: reads queries that it is not sure of, if the catalog has states; without it these are not looked at.

    Raises:
        CatalogError: the encoder is not the one that the catalog was built with, or the states are others.
    """

    def __init__(
        self,
        catalog: Catalog,
        encoder: Encoder,
        config: RoutingConfig | None = None,
        *,
        states: StateModel | None = None,
    ) -> None:
        catalog.check_encoder(encoder)
        if states is not None and catalog.states is not None:
            catalog.check_states(probed(states))
        self._states = states
        self.config = config or RoutingConfig()
        self.catalog = catalog
        self._encoder = encoder
        self._retriever = Retriever(catalog, self.config)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        encoder: Encoder | str = "default",
        states: StateModel | str | None = "default",
        config: RoutingConfig | None = None,
    ) -> Router:
        """Load the current catalog of a folder or `s3://` URI.

        Args:
            path: the catalog; "default" is the examples'.
            encoder: an encoder, or a folder or Hugging Face id of one; "default" is the one that lorauter ships.
            states: likewise, a model of states; loaded if the catalog has any. None looks at none.
            config: routing settings.

        Raises:
            CatalogError, StoreUnavailable, ConfigError.
        """
        from lorauter.defaults import load_encoder, load_states, resolve_catalog

        catalog = Catalog.load(resolve_catalog(str(path)))
        if isinstance(states, str):
            states = load_states(states) if catalog.states is not None else None
        return cls(catalog, load_encoder(encoder) if isinstance(encoder, str) else encoder, config, states=states)

    def route(
        self, texts: Sequence[str], options: RoutingOptions | Sequence[RoutingOptions] | None = None
    ) -> list[RoutingDecision]:
        """Decide for n texts, with the same options for all or n of them.

        Raises:
            InvalidRequest: a text is empty, or there are not as many options as texts.
        """
        if isinstance(texts, str):
            raise InvalidRequest("route takes a list of texts; got one string", param="input")
        if options is None or isinstance(options, RoutingOptions):
            options = [options or RoutingOptions()] * len(texts)
        if len(options) != len(texts):
            raise InvalidRequest(f"got {len(options)} options for {len(texts)} texts", param="options")
        for i, text in enumerate(texts):
            check_text(text, param=f"input[{i}]")
        if not texts:
            return []
        retrieved = self._retriever.retrieve_with(self._states, self._encoder.encode(texts), texts, options)
        return [
            compose(
                found,
                option,
                self.config,
                catalog_version=self.catalog.version,
                versions=self.catalog.adapters,
                composed=self.catalog.composed,
            )
            for found, option in zip(retrieved, options, strict=True)
        ]


def check_text(text: object, *, param: str) -> None:
    """Raise InvalidRequest unless `text` is something that can be routed."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{param} must be a string, got {type(text).__name__}", param=param)
    if not text.strip():
        raise InvalidRequest(f"{param} is empty; give a text to route", param=param)
    if not is_encodable(text):
        raise InvalidRequest(f"{param} holds half a character (a lone surrogate)", param=param)
