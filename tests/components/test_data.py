"""The section on a run's pictures: on the page of their step and in the last report; it never stops a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from components import data, page
from model.config import ShapesSource
from model.data.ingest import QUARANTINE
from model.errors import Stopped
from model.evaluation import census, report
from model.plumbing import storage
from model.plumbing.assets import PICTURES, AssetWriter, Manifest
from tests.data.test_ingest import folder, shapes
from tests.evaluation.test_census import some
from tests.instances import config, ingest

LARGEST_PAGE = 1 << 20  # bytes


@pytest.fixture
def images(store: str, tmp_path: Path) -> Manifest:
    """Pictures with all that there is a part of the section for."""
    return ingest(folder(some(tmp_path / "here"), validation_share=0.3, min_side=8))


def test_the_section_shows_every_part_and_escapes_what_strangers_wrote(images, capsys):
    text = data.section(images, config())
    heads = re.findall(r"<h3>(.*?)</h3>", text)
    assert heads == [
        "What it means for the result",
        "Pictures",
        "Captions",
        "Held-out pictures that look like one of training",
        "Training pictures that look alike",
        "Pictures with the same caption",
        "Left out",
    ]
    assert "“&lt;b&gt;the same&lt;/b&gt;”<" in text
    assert "<b>the same" not in text
    assert text.count('<figure class="pair">') >= 2
    assert "no pictures: .pdf" in text
    assert "cut.jpg: truncated" in text
    whole = page.page("Pictures", text)
    assert set(re.findall(r"(?:src|href|url)[=(]\s*(.{6})", whole)) == {'"data:'}
    assert "<script" not in whole
    assert len(whole.encode()) < LARGEST_PAGE
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("images | data: 40 pictures, 61 captions (23 different), 4.7 % left out; ")
    assert "pictures to train on; " in said[-1]
    assert data.section(images, config()) == text, "found beside the asset"


def test_a_page_of_a_set_that_fills_every_part_is_small(images, monkeypatch):
    full = census.take(images)
    most = {
        "across": full.across[:1] * census.PAIRS,
        "within": full.within[:1] * census.PAIRS,
        "missing": full.missing[:1] * 24,
        "groups": [one.model_copy(update={"some": one.some[:1] * 5}) for one in full.groups[:1] * 4],
    }
    noise = page._png(page.Image.effect_noise((64, 64), 99).convert("RGB"))
    heavy = full.across[0].pictures[0].model_copy(update={"data": page._embedded(noise).partition(",")[2]})
    pair = full.across[0].model_copy(update={"pictures": (heavy, heavy)})
    most |= {"across": [pair] * census.PAIRS, "within": [pair] * census.PAIRS}
    most["groups"] = [one.model_copy(update={"some": [heavy] * census.OF_A_GROUP}) for one in full.groups]
    text = report.data(full.model_copy(update=most), 24)
    assert len(text.encode()) < LARGEST_PAGE


def test_what_cannot_be_counted_stops_no_run(images, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise ValueError("an odd caption")

    with monkeypatch.context() as patch:
        patch.setattr(census, "count_words", fail)
        assert data.section(images, config()) == ""
    assert "images | warning: no report on the data: ValueError: an odd caption" in capsys.readouterr().out
    assert data.section(images, config()) != ""


def test_a_step_that_is_told_to_end_ends(images, monkeypatch):
    def stop(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(census, "take", stop)
    with pytest.raises(Stopped):
        data.section(images, config())


def test_a_file_that_is_gone_stops_no_run(images, capsys):
    storage.delete(images.where(QUARANTINE))
    assert data.section(images, config()) == ""
    assert "warning: no report on the data" in capsys.readouterr().out


def test_pictures_of_one_split_alone_have_a_section(store):
    made = ingest(shapes(source=ShapesSource(count=30, hold_out_compositions=False), validation_share=0))
    text = data.section(made, config())
    assert "Only 0 pictures held out" in text
    assert "Held-out pictures that look like" not in text


def evaluation(images: Manifest) -> Manifest:
    return AssetWriter("evaluation", {}, {"images": images}).finish({})


def test_the_last_report_has_the_section_before_the_lineage(images):
    lineage = "<section>\n  <h2>Lineage</h2>\n</section>"
    whole = f"<html><main>\n<section>\n<h2>Tokenizer</h2>\n</section>\n{lineage}\n</main></html>"
    measured = evaluation(images)
    assert data.in_report(whole, measured, config()) == whole, "nobody counted"
    section = data.section(images, config())
    text = data.in_report(whole, measured, config())
    assert text == whole.replace(lineage, f"{section}\n{lineage}")


def test_a_report_of_another_form_has_it_at_its_end_or_stays_as_it_is():
    assert report.with_data("<main><p>x</p></main>", "SECTION") == "<main><p>x</p>SECTION\n</main>"
    assert report.with_data("no page", "SECTION") == "no page"


def test_pictures_that_are_gone_leave_the_report_as_it_is(images, capsys):
    measured = evaluation(images)
    storage.delete_prefix(images.uri)
    assert data.in_report("<main></main>", measured, config()) == "<main></main>"
    assert "register | warning: no section on the data" in capsys.readouterr().out


def test_the_page_lies_beside_the_pictures(images, monkeypatch, capsys):
    data.leave(images, "<p>ä</p>")
    assert storage.read_bytes(storage.join(images.uri, PICTURES, data.NAME)).decode() == "<p>ä</p>"

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(storage, "write_bytes", full)
    data.leave(images, "")
    assert "images | warning: data.html cannot be stored: no space left" in capsys.readouterr().out
