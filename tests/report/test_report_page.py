"""`report.page` and `report.owned_folder`: a page that needs nothing else, numbers in CSV, and
folders that are not overwritten.
"""

import csv
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from quweit_jax.costs import count, energy
from quweit_jax.errors import InputError
from quweit_jax.report import insight, owned_folder, page, summary

pytestmark = pytest.mark.usefixtures("compile_quickly")

CRUEL = "<script>alert('1')</script> & \"x\""
MODEL = {
    "name": "gpt",
    "mlp": "weightless",
    "layers": 1,
    "heads": 1,
    "width": 8,
    "context": 4,
    "weightless": {"num_luts": 12},
}
CONFIG = {
    "model": MODEL,
    "data": {"source": "text_file", "path": "", "tokenizer": "byte"},
    "steps": 4,
    "note": CRUEL,
}
ROWS = [
    {"step": s, "split": k, "loss": 3.0 - 0.1 * s, "accuracy": 0.1 * s}
    for s in (1, 2, 3, 4)
    for k in ("train", "validation")
]


def look_up_layer(**more):
    kinds = {"constant": 1, "copy": 2, "threshold": 3, "other": 6}
    reads = np.asarray([0, 5, 7, 12, 24, 0])
    return insight.LayerInsight("block_0/mlp", 0, 4, kinds, reads, 0.5 * reads, 3, **more)


def made(number, **more):
    counted = count.of_config(CONFIG)
    known = {
        "config": CONFIG,
        "environment": {"jax": "0"},
        "rows": ROWS,
        "language": True,
        "data": "text",
        "costs": counted,
    }
    return summary.RunSummary(
        number, f"run {CRUEL}", "/runs/x", **{**known, "energy": energy.estimate(counted), **more}
    )


@pytest.fixture(scope="module")
def files():
    watched = insight.Insight(
        (look_up_layer(balance=np.linspace(0, 1, 12), kept=11),), insight.Pruned(20, 20, 19, 12, 1)
    )
    unwatched = insight.Insight((look_up_layer(),), None, "no data")
    picture = summary.ClassifiedImage(np.zeros((4, 4, 3), np.uint8), "cat", "dog", 0.5)
    shown = [
        made(1, insight=watched, text=("To be", CRUEL)),
        made(
            2,
            insight=unwatched,
            rows=[{**row, "loss": row["loss"] + 0.2} for row in ROWS],
            state="unfinished",
            reason="at step 4 of 9",
        ),
        made(3, language=False, images=[picture], data="pictures"),
        summary.RunSummary(4, "broken", "/runs/y", "damaged", "config.json: there is none"),
        made(5, rows=[], costs=None, energy=None, notes=[CRUEL]),
    ]
    return page.write(
        shown, [("nowhere", "there is nothing")], technology="45nm", title=f"Runs {CRUEL}"
    )


class Reader(HTMLParser):
    """What a page refers to, its ids, its headings, and elements without a text for those who don't
    see them.
    """

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.silent, self.headings = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [
            values[key] for key in ("src", "href", "srcset", "xlink:href") if values.get(key)
        ]
        if (tag == "img" and not values.get("alt")) or (
            tag == "svg" and not (values.get("role") == "img" and values.get("aria-label"))
        ):
            self.silent.append(tag)
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))


def test_the_page_needs_nothing_and_leaves_nobody_out(files):
    text = files["index.html"].decode()
    read = Reader(text)
    assert "script" not in read.tags and CRUEL not in text
    assert all(link.startswith(("#", "data:image/png")) or link in files for link in read.links)
    assert {link[1:] for link in read.links if link.startswith("#")} <= set(read.ids)
    assert len(read.ids) == len(set(read.ids))
    assert not read.silent and read.tags.count("svg") > 12 and read.tags.count("img") == 1
    assert read.headings[0] == 1 and all(
        b - a <= 1 for a, b in zip(read.headings, read.headings[1:])
    )
    assert (
        "prefers-color-scheme: dark" in text
        and 'name="viewport"' in text
        and "url(http" not in text
    )


def test_what_the_page_says(files):
    text = files["index.html"].decode()
    assert "config.json: there is none" in text and "at step 4 of 9" in text and "nowhere" in text
    assert "1 of 12 tables could be dropped" in text and "19 of" in text
    assert "Horowitz" in text  # the assumptions


def test_every_plot_is_a_png_too(files):
    names = [name for name in files if name.endswith(".png")]
    assert {
        "group1-loss.png",
        "group1-loss-energy.png",
        "group1-loss-memory.png",
        "group2-accuracy-energy.png",
        "run1-kinds.png",
    } <= set(names)
    assert all(files[name].startswith(b"\x89PNG") for name in names)
    assert Reader(files["index.html"].decode()).tags.count("svg") == len(names)


def read_csv(content):
    return list(csv.DictReader(io.StringIO(content.decode())))


def test_numbers_are_in_csv(files):
    runs = read_csv(files["runs.csv"])
    counted = count.of_config(CONFIG)
    assert [r["state"] for r in runs] == [
        "finished",
        "unfinished",
        "finished",
        "damaged",
        "finished",
    ]
    assert (
        float(runs[0]["validation loss"]) == pytest.approx(2.6)
        and int(runs[0]["parameters"]) == counted.parameters
    )
    assert (
        int(runs[0]["bytes deployed"]) == sum(counted.bytes_stored.values())
        and runs[3]["parameters"] == ""
    )
    assert float(runs[0]["energy, pJ"]) == pytest.approx(energy.estimate(counted).total_pj)
    kinds = [row for row in read_csv(files["energy.csv"]) if row["run"] == "1"]
    assert sum(
        float(row["arithmetic_pj"]) + float(row["memory_pj"]) for row in kinds
    ) == pytest.approx(float(runs[0]["energy, pJ"]))
    assert len(read_csv(files["curves.csv"])) == 3 * len(ROWS)
    (layer, _) = read_csv(files["lookup_layers.csv"])
    assert (
        layer["tables"],
        layer["threshold"],
        layer["could_be_dropped"],
        layer["inputs_never_read"],
    ) == ("12", "3", "1", "2")
    assert [(r["feature"], r["threshold"], r["reads"]) for r in read_csv(files["reads.csv"])][
        4
    ] == ("1", "1", "24")


def test_runs_of_other_data_are_apart():
    groups = summary.group([made(1), made(2, fingerprint="b"), made(3), made(4, language=None)])
    assert [[r.number for r in g.runs] for g in groups] == [[1, 3], [2]]
    assert len({g.title for g in groups}) == 2


def test_a_folder_is_written_again_and_nothing_else_is(tmp_path):
    out = tmp_path / "new" / "report"
    owned_folder.write(out, {"index.html": b"1", "old.png": b"2"})
    (out / "mine.txt").write_text("mine")
    owned_folder.write(out, {"index.html": b"3", "new.png": b"4"})
    assert {p.name for p in out.iterdir()} == {
        "index.html",
        "new.png",
        "mine.txt",
        "report.json",
    } and (out / "index.html").read_bytes() == b"3"
    with pytest.raises(InputError, match=r"mine\.txt is there, and no report wrote it"):
        owned_folder.write(out, {"mine.txt": b"5"})
    assert (out / "mine.txt").read_text() == "mine"


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds files and no report\.json"):
        owned_folder.check(tmp_path)
    with pytest.raises(InputError, match="is a file; give a folder"):
        owned_folder.check(tmp_path / "notes.txt")
    for content in (
        "[]",
        "{",
        '{"written_by": "quweit_jax.report", "files": ["../x"]}',
        json.dumps({"written_by": "other", "files": []}),
    ):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(InputError, match="is not the list of an earlier report"):
            owned_folder.check(tmp_path)
