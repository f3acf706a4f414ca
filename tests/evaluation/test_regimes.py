import pytest

from lorauter.errors import ConfigError
from lorauter.evaluation.regimes import REGIMES, options_for
from lorauter.routing import RoutingOptions


def test_a_regime_hides_what_its_name_says() -> None:
    own = ["mnli", "mnli-large"]
    assert {regime: options_for(regime, "mnli", own) for regime in REGIMES} == {
        "in-domain": RoutingOptions(),
        "semi-OOD": RoutingOptions(exclude_adapters=frozenset(own)),
        "OOD": RoutingOptions(exclude_adapters=frozenset(own), exclude_tasks=frozenset({"mnli"})),
    }


def test_another_regime_is_refused() -> None:
    with pytest.raises(ConfigError, match="'ood' is not one of in-domain, semi-OOD, OOD"):
        options_for("ood", "mnli", [])
