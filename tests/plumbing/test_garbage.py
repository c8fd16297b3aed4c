"""What of a store goes, on graphs by chance: nothing that anybody needs, and all the rest."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from model.plumbing.assets import NAME, PICTURES, REPORT
from model.plumbing.garbage import Asset, Garbage, Id, Registered, garbage
from model.plumbing.storage import Stored

SPARED = 10.0
OLD, YOUNG = 20.0, 5.0
FILES = ("0.tar", "1.tar", "2.tar")
Graph = dict[Id, Asset]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, list[Registered], set[Id]]:
    """Assets that are made from earlier ones, take files over, hold pictures; what is registered, used."""
    assets: Graph = {}
    for number in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(["images", "images", "tokens", "benchmark", "model"]))
        one = f"{kind}/{number:016x}"
        before = list(assets)
        some = st.sets(st.sampled_from(before), max_size=3) if before else st.just(set())
        inputs = draw(some)
        complete = draw(st.integers(0, 4)) > 0
        images = [other for other in before if other.startswith("images/")]
        shown = {one} if kind == "images" else draw(st.sets(st.sampled_from(images))) if images else set()
        holds = complete and kind != "model"
        from_older = [(other, name) for other in before if other.startswith(kind) for name in FILES]
        taken = draw(st.sets(st.sampled_from(from_older), max_size=3)) if complete and from_older else set()
        age = draw(st.sampled_from([OLD, OLD, OLD, YOUNG]))
        names = [*FILES, "checkpoints/0", f"{PICTURES}/0.png", f"{REPORT}1.html"]
        objects = {name: Stored(draw(st.integers(0, 9)), OLD) for name in names}
        objects[draw(st.sampled_from(names))] = Stored(1, age)
        if complete:
            objects[NAME] = Stored(1, OLD)
        assets[one] = Asset(
            objects,
            files=frozenset({NAME, *FILES}) if complete else frozenset(),
            inputs=frozenset(inputs),
            taken=frozenset(taken),
            pictures=frozenset(shown) if holds else frozenset(),
        )
    subset = st.sets(st.sampled_from(list(assets)), max_size=2)
    which = st.sampled_from(["", "images/gone", *(one for one in assets if one.startswith("images/"))])
    benchmark = st.sampled_from(["", *(one for one in assets if one.startswith("benchmark/"))])
    registered = st.builds(Registered, subset.map(frozenset), which, benchmark)
    return assets, draw(st.lists(registered, max_size=3)), draw(subset)


def gone(found: Garbage) -> list[tuple[Id, str]]:
    """Objects in the order in which they go."""
    parts = (*found.assets.items(), *found.scratch.items())
    return [(one, name) for one, names in parts for name in names]


def needs(assets: Graph, one: Id) -> set[Id]:
    """An asset, and all that it was made from."""
    return {one}.union(*(needs(assets, other) for other in assets[one].inputs if other in assets))


def all_needs(assets: Graph, of: set[Id]) -> set[Id]:
    return set().union(*(needs(assets, one) for one in of))


def superseded(assets: Graph, one: Id, by: Registered) -> bool:
    """Whether it holds pictures of other images than those that stand for the source."""
    known = by.current in assets and assets[by.current].complete
    return known and one != by.pinned and bool(assets[one].pictures - {by.current})


def wanted(assets: Graph, by: Registered) -> set[Id]:
    """What somebody registered needs."""
    left = {one: asset for one, asset in assets.items() if asset.complete and not superseded(assets, one, by)}
    return all_needs(left, left.keys() & {*by.made_from, by.current, by.pinned})


@settings(max_examples=400, deadline=None)
@given(graphs())
def test_nothing_that_is_needed_ever_goes_and_all_else_does(
    graph: tuple[Graph, list[Registered], set[Id]],
) -> None:
    assets, registered, used = graph
    went = set(gone(garbage(assets, registered, used, SPARED)))
    fresh = {one for one in assets if any(part.age < SPARED for part in assets[one].objects.values())}
    staying = all_needs(assets, used | fresh).union(*(wanted(assets, by) for by in registered))
    for one, asset in assets.items():
        for name, part in asset.objects.items():
            led_here = asset.complete and name.startswith("checkpoints/") and part.age >= SPARED
            needed = one in staying and not (led_here and one not in used)
            needed |= any((one, name) in assets[other].taken for other in staying if assets[other].complete)
            if needed:
                assert (one, name) not in went, "somebody needs it"
            else:
                assert (one, name) in went, "nobody needs it"


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_one_that_is_killed_at_any_instant_is_finished_by_the_next(
    graph: tuple[Graph, list[Registered], set[Id]],
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


def asset(*names: str, **rest: object) -> Asset:
    """A complete one that is old."""
    objects = {name: Stored(1, OLD) for name in (NAME, *names)}
    return Asset(objects, frozenset(objects), **rest)  # type: ignore[arg-type]


def lines(*images: str) -> Graph:
    """Two runs on pictures of which the second has grown from the first; each with what it made."""
    first, second = images
    taken = frozenset({(f"images/{first}", "0.tar")})
    return {
        one: made
        for name in images
        for one, made in {
            f"images/{name}": asset(
                "0.tar" if name == first else "2.tar",
                "1.tar",
                pictures=frozenset({name}),
                taken=taken if name == second else frozenset(),
            ),
            f"tokens/{name}": asset("0", inputs=frozenset({f"images/{name}"}), pictures=frozenset({name})),
            f"transformer/{name}": asset("weights", inputs=frozenset({f"tokens/{name}"})),
            f"benchmark/{name}": asset("train-000000.tar", pictures=frozenset({name})),
            f"evaluation/{name}": asset(
                "report.html",
                inputs=frozenset({f"images/{name}", f"transformer/{name}", f"benchmark/{name}"}),
            ),
        }.items()
    }


def versions(*names: str, current: str, pinned: str = "") -> list[Registered]:
    """Of one registered model."""
    made_from = [frozenset({f"{kind}/{name}" for kind in ("evaluation", "images")}) for name in names]
    return [Registered(one, f"images/{current}" if current else "") for one in made_from] + [
        Registered(frozenset(), f"images/{current}", pinned)
    ]


def test_pictures_that_were_deleted_go_even_where_a_champion_was_trained_on_them() -> None:
    assets = lines("a", "b")
    found = garbage(assets, versions("a", "b", current="b"), set(), SPARED)
    assert found.assets == {
        "benchmark/a": [NAME, "train-000000.tar"],
        "images/a": [NAME, "1.tar"],
        "tokens/a": [NAME, "0"],
    }
    pinned = garbage(assets, versions("a", "b", current="b", pinned="benchmark/a"), set(), SPARED)
    assert pinned.assets.keys() == {"images/a", "tokens/a"}, "what versions are measured on stays"
    assert garbage(assets, versions("a", "b", current="b"), {"evaluation/a"}, SPARED).assets == {}, (
        "a run lives"
    )


def test_pictures_that_were_taken_back_at_the_source_go() -> None:
    """Added, trained on, not promoted, and deleted: the source is what the first version was made from."""
    found = garbage(lines("a", "b"), versions("a", "b", current="a"), set(), SPARED)
    assert found.assets.keys() == {"images/b", "tokens/b", "benchmark/b"}
    assert "1.tar" in found.assets["images/b"]


def test_what_another_registered_model_needs_is_not_superseded() -> None:
    assets = lines("a", "b")
    both = [*versions("a", "b", current="b"), *versions("a", current="a")]
    assert garbage(assets, both, set(), SPARED).assets == {}
    unknown = [*versions("a", "b", current="b"), Registered(frozenset({"evaluation/a"}))]
    assert garbage(assets, unknown, set(), SPARED).assets == {}, "an earlier release's, which says nothing"


def test_where_the_current_pictures_are_not_there_none_are_superseded() -> None:
    assets = lines("a", "b")
    assert garbage(assets, versions("a", "b", current="c"), set(), SPARED).assets == {}
    part = {**assets, "images/b": Asset(assets["images/b"].objects)}
    assert "images/a" not in garbage(part, versions("a", "b", current="b"), set(), SPARED).assets


def test_reports_with_a_verdict_are_no_scratch() -> None:
    objects = {name: Stored(1, OLD) for name in (NAME, "report.html", f"{REPORT}3.html", "attempts/1/log")}
    assets = {"evaluation/a": Asset(objects, frozenset({NAME, "report.html"}))}
    found = garbage(assets, [Registered(frozenset(assets))], set(), SPARED)
    assert found.scratch == {"evaluation/a": ["attempts/1/log"]}
