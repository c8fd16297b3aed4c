"""What of a store goes, on graphs by chance: nothing that anybody needs, and all the rest."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from model.plumbing.assets import NAME, PICTURES
from model.plumbing.garbage import Asset, Garbage, Id, garbage
from model.plumbing.storage import Stored

SPARED = 10.0
OLD, YOUNG = 20.0, 5.0
FILES = ("0.tar", "1.tar", "2.tar")
Graph = dict[Id, Asset]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, set[Id], set[Id]]:
    """Assets that are made from earlier ones, take files over, grow; what is registered, what is used."""
    assets: Graph = {}
    for number in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(["images", "images", "tokens", "transformer", "model"]))
        one = f"{kind}/{number:016x}"
        before = list(assets)
        some = st.sets(st.sampled_from(before), max_size=3) if before else st.just(set())
        inputs = draw(some)
        complete = draw(st.integers(0, 4)) > 0
        images = [other for other in before if other.startswith("images/")]
        grown_from = draw(st.sampled_from(["", *images])) if kind == "images" and complete else ""
        from_older = [(other, name) for other in before if other.startswith(kind) for name in FILES]
        taken = draw(st.sets(st.sampled_from(from_older), max_size=3)) if complete and from_older else set()
        age = draw(st.sampled_from([OLD, OLD, OLD, YOUNG]))
        names = [*FILES, "checkpoints/0", f"{PICTURES}/0.png"]
        objects = {name: Stored(draw(st.integers(0, 9)), OLD) for name in names}
        objects[draw(st.sampled_from(names))] = Stored(1, age)
        if complete:
            objects[NAME] = Stored(1, OLD)
        assets[one] = Asset(
            objects,
            files=frozenset({NAME, *FILES}) if complete else frozenset(),
            inputs=frozenset(inputs),
            taken=frozenset(taken),
            grown_from=grown_from,
        )
    subset = st.sets(st.sampled_from(list(assets)), max_size=2)
    return assets, draw(subset), draw(subset)


def gone(found: Garbage) -> list[tuple[Id, str]]:
    """Objects in the order in which they go."""
    parts = (*found.assets.items(), *found.scratch.items())
    return [(one, name) for one, names in parts for name in names]


def needs(assets: Graph, one: Id) -> set[Id]:
    """An asset, and all that it was made from."""
    return {one}.union(*(needs(assets, other) for other in assets[one].inputs if other in assets))


def all_needs(assets: Graph, of: set[Id]) -> set[Id]:
    return set().union(*(needs(assets, one) for one in of))


def grew_from(assets: Graph, young: Id, old: Id) -> bool:
    older = assets[young].grown_from if young in assets else ""
    return bool(older) and (older == old or grew_from(assets, older, old))


def outgrown(assets: Graph, by: set[Id]) -> set[Id]:
    images = {old for old in assets if any(grew_from(assets, young, old) for young in by)}
    return images | {one for one in assets if one.startswith("tokens/") and assets[one].inputs & images}


@settings(max_examples=400, deadline=None)
@given(graphs())
def test_nothing_that_is_needed_ever_goes_and_all_else_does(
    graph: tuple[Graph, set[Id], set[Id]],
) -> None:
    assets, registered, used = graph
    went = set(gone(garbage(assets, registered, used, SPARED)))
    fresh = {one for one in assets if any(part.age < SPARED for part in assets[one].objects.values())}
    in_use = all_needs(assets, used | fresh)
    whole = {one: asset for one, asset in assets.items() if asset.complete}
    made_from = all_needs(whole, registered & whole.keys())
    staying = in_use | (made_from - outgrown(assets, made_from))
    for one, asset in assets.items():
        for name, part in asset.objects.items():
            led_here = asset.complete and name.startswith("checkpoints/") and part.age >= SPARED
            needed = one in staying and not (led_here and one not in used)
            needed |= any((one, name) in assets[other].taken for other in staying if assets[other].complete)
            between = one in outgrown(assets, made_from) and any(
                grew_from(assets, one, other) for other in in_use
            )
            if needed:
                assert (one, name) not in went, "somebody needs it"
            elif not between and one not in staying:
                shared = any(
                    (one, name) in assets[other].taken for other in assets if (other, NAME) not in went
                )
                assert shared or (one, name) in went, "nobody needs it"
            elif led_here and one not in used and not between:
                assert (one, name) in went, "it led to what is complete"


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_one_that_is_killed_at_any_instant_is_finished_by_the_next(
    graph: tuple[Graph, set[Id], set[Id]],
) -> None:
    assets, registered, used = graph
    order = gone(garbage(assets, registered, used, SPARED))
    left = dict(assets)
    for number, (one, name) in enumerate(order, 1):
        objects = {other: part for other, part in left[one].objects.items() if other != name}
        if name == NAME:  # what it named nobody can tell any more
            left[one] = Asset(objects)
        else:
            left[one] = replace(left[one], objects=objects)
        if not objects:
            del left[one]
        rest = gone(garbage(left, registered, used, SPARED))
        assert set(rest) == set(order[number:])


def test_pictures_that_were_deleted_go_even_where_a_champion_was_trained_on_them() -> None:
    def asset(*names: str, **rest: object) -> Asset:
        objects = {name: Stored(1, OLD) for name in (NAME, *names)}
        return Asset(objects, frozenset(objects), **rest)  # type: ignore[arg-type]

    assets = {
        "images/a": asset("0.tar", "1.tar"),
        "tokens/a": asset("0", "1", inputs=frozenset({"images/a"})),
        "transformer/a": asset("weights", inputs=frozenset({"tokens/a"})),
        "images/b": asset("2.tar", grown_from="images/a", taken=frozenset({("images/a", "0.tar")})),
        "tokens/b": asset("2", inputs=frozenset({"images/b"}), taken=frozenset({("tokens/a", "0")})),
        "transformer/b": asset("weights", inputs=frozenset({"tokens/b"})),
    }
    both = {"transformer/a", "transformer/b"}
    found = garbage(assets, both, set(), SPARED)
    assert found.assets == {"tokens/a": [NAME, "1"], "images/a": [NAME, "1.tar"]}
    assert not garbage(assets, {"transformer/a"}, {"images/b"}, SPARED).assets.keys() & {"images/a"}, (
        "a run that grew them came to no end yet"
    )
    assert garbage(assets, both, {"transformer/a"}, SPARED).assets == {}, "a run that lives uses them"
