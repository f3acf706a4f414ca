"""What options come to on a catalog."""

import numpy as np
from three_tasks import ANY, TEXTS

from lorauter.catalog import Catalog
from lorauter.catalog.index import TaskSubset
from lorauter.routing import RoutingConfig, RoutingOptions
from lorauter.routing.asked import Asked


class OfTwo(RoutingOptions):
    """Options of who may see the first two tasks."""

    def among(self, catalog: Catalog) -> TaskSubset | None:
        return TaskSubset(np.array([True, True, False]))


def test_all_tasks_are_judged_where_there_are_no_more_than_a_query_is_judged_by(catalog) -> None:
    whole = Asked.of(ANY, catalog, RoutingConfig())
    assert (whole.whole, whole.among, whole.any, whole.top_k) == (True, None, True, 16)
    some = RoutingConfig(candidates=2, num_tasks=1, top_k=2)
    assert not Asked.of(ANY, catalog, some).whole
    assert Asked.of(RoutingOptions(top_k=3), catalog, some).whole
    assert Asked.of(RoutingOptions(preset="paper"), catalog, RoutingConfig(num_tasks=2)).wanted == 3


def test_of_them_those_that_the_caller_may_see_and_has_not_excluded(catalog) -> None:
    first, *others = TEXTS
    without = Asked.of(RoutingOptions(exclude_tasks={first, "unheard-of"}), catalog, RoutingConfig())
    assert without.excluded == {0}
    assert without.among.tolist() == [False, True, True]
    assert Asked.of(OfTwo(), catalog, RoutingConfig()).among.tolist() == [True, True, False]
    both = Asked.of(OfTwo(exclude_tasks={first}), catalog, RoutingConfig())
    assert both.among.tolist() == [False, True, False]
    assert not Asked.of(OfTwo(exclude_tasks={first, others[0]}), catalog, RoutingConfig()).any
    assert Asked.of(OfTwo(exclude_tasks={others[1]}), catalog, RoutingConfig()).excluded == frozenset()


def test_which_adapters_may_be_used(catalog) -> None:
    asked = Asked.of(RoutingOptions(exclude_adapters={"critic"}), catalog, RoutingConfig())
    assert asked.allows(["critic", "writer"]).tolist() == [False, True]
