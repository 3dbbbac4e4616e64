"""Choosing who gets a vector index of their own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memharbor.schema.tenants import choose_tenants, index_name
from memharbor.templates import IDENTIFIER_BYTES_MAX

counts = st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 40), max_size=12)


def test_the_largest_come_first_and_the_rest_waits() -> None:
    choice = choose_tenants({"a": 10, "b": 30, "c": 20, "d": 9}, frozenset(), threshold_rows=10, limit=2)
    assert (choice.create, choice.wait) == (("b", "c"), ("a",))


def test_an_index_stays_until_its_user_is_below_half_the_threshold() -> None:
    for count, kept in ((10, True), (5, True), (4, False)):
        choice = choose_tenants({"a": count}, frozenset({"a"}), threshold_rows=10, limit=5)
        assert (choice.keep == ("a",), choice.drop == ("a",)) == (kept, not kept)


def test_the_index_of_a_user_who_is_gone_is_dropped() -> None:
    assert choose_tenants({}, frozenset({"gone"}), threshold_rows=10, limit=5).drop == ("gone",)


def test_a_limit_of_none_drops_every_index() -> None:
    choice = choose_tenants({"a": 50}, frozenset({"a"}), threshold_rows=10, limit=0)
    assert (choice.drop, choice.create, choice.keep) == (("a",), (), ())


@given(counts, st.sets(st.text(min_size=1, max_size=3), max_size=6), st.integers(1, 30), st.integers(0, 5))
def test_a_choice_is_within_the_limit_and_a_second_one_changes_nothing(
    row_counts: dict[str, int], indexed: set[str], threshold_rows: int, limit: int
) -> None:
    first = choose_tenants(row_counts, frozenset(indexed), threshold_rows=threshold_rows, limit=limit)
    present = (indexed - set(first.drop)) | set(first.create)
    assert present == {*first.keep, *first.create}
    assert len(present) <= limit
    second = choose_tenants(row_counts, frozenset(present), threshold_rows=threshold_rows, limit=limit)
    assert (second.create, second.drop) == ((), ())


@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=300))
def test_an_index_name_is_safe_whatever_the_user_is_called(user_id: str) -> None:
    name = index_name(user_id)
    assert name.isascii()
    assert name.replace("_", "").isalnum()
    assert len(name) <= IDENTIFIER_BYTES_MAX
