"""A run's page as a file, and in a real browser where one is installed."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_sft.charts import Axis, Series, bars, chart
from mlx_sft.errors import UserError
from mlx_sft.report.page import page_html, write_report
from mlx_sft.report.run import RunFiles
from mlx_sft.run_folder import RunFolder
from tests.pages import Parts, contrast, shown
from tests.report.conftest import HOSTILE, MakeFolder, evaluation, sample, step, write_samples

pytestmark = pytest.mark.fast


@pytest.fixture
def page_file(make_folder: MakeFolder) -> Path:
    """Of a run in which everything that anyone can name is hostile."""
    records = [step(n, 3.0 - n / 50, epoch=n / 40) for n in range(1, 101)]
    records[50] = step(51, None, skipped_rows=[HOSTILE])
    records += [evaluation(n, 3.0 - n / 60) for n in range(20, 101, 20)]
    records += [{"kind": HOSTILE, "step": 60}, {"kind": "rollback", "step": 61, "diverged_at": HOSTILE}]
    records += [step(100, 1.0, **{HOSTILE: 0.5})]
    histogram = [{"from": 1, "to": 9, "count": 7}, {"from": 10, "to": 20, "count": 3}]
    train = {"rows": 90, "tokens": 900, "supervised_tokens": 300, "histogram": histogram}
    data = {"warnings": [HOSTILE], "sources": [{"name": HOSTILE, "rows": 3}], "train": train}
    settings = {
        "model": HOSTILE,
        "data": [HOSTILE],
        "method": HOSTILE,
        HOSTILE: HOSTILE,
        "columns": {HOSTILE: [HOSTILE]},
    }
    run = make_folder(records, "<img src=x onerror=alert(1)>", settings=settings, data=data, finished=False)
    write_samples(run, [sample(step, HOSTILE, HOSTILE, wanted=HOSTILE) for step in (0, 20, 100)])
    return write_report(run)


def test_the_page_is_one_file_that_asks_for_nothing(page_file: Path) -> None:
    parts = Parts(page_file.read_text(encoding="utf-8"))
    assert page_file.name == "report.html"
    assert not [names for _, names in parts.elements if names.keys() & {"src", "href", "style", "onclick", "onerror"}]
    assert not {tag for tag, _ in parts.elements} & {"img", "link", "iframe", "object", "base", "form"}
    policy = next(str(a["content"]) for _, a in parts.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_nothing_that_is_named_becomes_code(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script") == 1
    assert text.count("&lt;/script&gt;&lt;script&gt;") >= 13
    assert "<img" not in text
    assert "\u202e" not in text


def test_the_page_says_what_the_files_say(make_folder: MakeFolder) -> None:
    records = [step(n, 3.0, epoch=n / 40) for n in range(1, 101)] + [evaluation(50, 2.0), evaluation(100, 1.0)]
    run = make_folder(records, settings={"rank": 8, "micro_batch_tokens": 512, "optimizer": "adamw", "own": 1})
    run.joinpath("checkpoints/step-00000050").mkdir(parents=True)
    text = write_report(run).read_text()
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text.partition("<body>")[2].partition("<script")[0]))
    for words in (
        "100 read, 90 to train on, 10 held out", "9,000, 33% of them supervised", "5 rows are odd", "4.0 MB predicted",
        "rank 8 default 16", "Chosen for the model and the machine micro_batch_tokens 512", "own 1",
        "step 50 a checkpoint that is kept", "step 100 the best of 2 evaluations, validation loss 1.0000",
        f"mlx-sft chat {run}", "validation loss 1 best, step 100, 50.0% of tokens right",
    ):  # fmt: skip
        assert words in plain, words
    assert 'http-equiv="refresh"' not in text


def test_the_page_tells_when_things_were_in_local_time(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    try:
        records = [
            step(1, 2.0, time="2026-01-30T22:30:00.000Z"),
            step(2, None, time="2026-01-30T23:04:05.678Z"),
            step(3, 1.0, time=HOSTILE),
            step(4, 1.0, time="9999-12-31T23:59:59Z"),
            step(5, 1.0, time=7),
            step(6, 1.0, time="2026-01-31T00:30:00.000Z"),
        ]
        text = write_report(make_folder(records)).read_text()
    finally:
        monkeypatch.undo()
        time.tzset()
    assert "31 Jan 2026 00:30 to 02:30" in text
    assert "skipped, because its gradient was not finite (01:04:05)" in text


def test_a_run_that_trains_has_a_page_that_loads_itself_again(make_folder: MakeFolder) -> None:
    run = RunFolder(make_folder([step(1, 2.0)], finished=False))
    with run.locked():
        text = write_report(run.path).read_text()
    assert '<meta http-equiv="refresh" content="30">' in text
    assert "It is training: step 1 of 100" in text
    assert "refresh" not in write_report(run.path).read_text().partition("<style>")[0]


def test_a_page_of_very_many_steps_is_small(make_folder: MakeFolder) -> None:
    run = make_folder((step(n, 1 + n % 7 / 10) for n in range(1, 8001)), planned=8000)
    assert write_report(run).stat().st_size < 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "- 1", "not a mapping"),
        ("environment.json", "[]", "not a mapping"),
        ("data_report.json", "{", "not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(make_folder: MakeFolder, name: str, content: str, message: str) -> None:
    run = make_folder([])
    (run / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        write_report(run)
    assert name in caught.value.where


def test_values_of_other_kinds_say_nothing(make_folder: MakeFolder) -> None:
    settings: dict[str, Any] = {"model": None, "data": 7, "method": ["x"], "max_grad_norm": "y", "epochs": "z"}
    data: dict[str, Any] = {
        "totals": 5,
        "train": {"histogram": [3], "lengths": [], "rows": -1},
        "sources": [1],
        "warnings": 3,
    }
    run = RunFolder(make_folder([step(1, 1.0)], settings=settings, data=data))
    run.environment.write_text('{"total_steps": "many", "memory": 3, "packages": [1], "device": 5}')
    assert "Finished after step 1, 0 epochs in 0:02." in page_html(RunFiles.of(run), "finished")


def test_a_data_report_that_is_very_large_is_left_out(make_folder: MakeFolder) -> None:
    run = make_folder([])
    with (run / "data_report.json").open("wb") as file:
        file.truncate(65 * 2**20)
    assert "data_report.json has 68 MB, too much to be read" in write_report(run).read_text()


def test_ticks_are_round_and_within() -> None:
    drawn = chart([Series([(0, 0.0), (97, 3.1)])])
    assert re.findall(r'text-anchor="middle">([^<]*)<', drawn) == ["0", "20", "40", "60", "80"]
    assert re.findall(r'text-anchor="end">([^<]*)<', drawn) == ["0", "1", "2", "3"]
    powers = chart([Series([(1, 0.001), (2, 100.0)])], y=Axis(powers=None))
    assert re.findall(r'text-anchor="end">([^<]*)<', powers) == ["0.001", "0.01", "0.1", "1", "10", "100"]


@pytest.mark.parametrize(
    "points",
    [[(5, 0.0)], [(1, 2.0), (2, 2.0)], [(1, 1e-300), (2, 1e190)], [(1, -3.0), (1, -3.0)], [(0, 1e150), (1, 1e150)]],
)
def test_any_finite_points_can_be_drawn(points: list[tuple[float, float]]) -> None:
    for powers in (None, True, False):
        drawn = chart([Series(points, "x", look="line and dots")], y=Axis(powers=powers))
        assert "nan" not in drawn
        assert "inf" not in drawn


def test_bars_and_charts_of_nothing() -> None:
    assert bars([("1–9", 0)]) == ""
    assert "Nothing to draw" in chart([Series([])])


def test_answers_stand_beside_each_other_by_the_step(make_folder: MakeFolder) -> None:
    run = make_folder([evaluation(n, 3.0 - n / 40 if n < 60 else 4.0) for n in range(5, 101, 5)])
    write_samples(run, [{"kind": "odd"}, sample(0, "the cat", "meows", wanted="sat", number=1)])
    write_samples(run, [sample(n, "the cat", f"answer {n}", wanted="sat", cut=n == 100) for n in range(5, 101, 5)])
    (run / "samples.jsonl").write_bytes(
        (run / "samples.jsonl").read_bytes() + b'7\n\xff{\n{"prompt": 3, "answer": "x"}\n{"pro'
    )
    text = write_report(run).read_text()
    table = text.partition('<div class="samples"')[2].partition("</table>")[0]
    headers = re.findall(r"<th[^>]*>([^<]*)</th>", table)
    assert headers[:4] == ["prompt", "wanted", "before", "step 100 (last)"]
    assert len(headers) == 3 + 6
    assert "step 55 (best)" in headers
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", table, re.S)]
    assert cells[:4] == ["the cat", "sat", "meows", "answer 100 … (cut)"]
    assert [f"step {cell.partition(' ')[2]}" for cell in cells[4:]] == [one.partition(" (")[0] for one in headers[4:]]
    assert "14 more steps are in samples.jsonl" in text


def test_what_is_told_of_pairs_is_drawn_together(make_folder: MakeFolder) -> None:
    names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "kl",
    )
    records = [step(n, 1.0, **{name: float(n) for name in names}) for n in range(1, 9)]
    records += [evaluation(n, 1.0) | dict.fromkeys(names, 0.5) for n in (4, 8)]
    text = write_report(make_folder(records, settings={"objective": "dpo"})).read_text()
    figures = [part.partition("</figure>")[0] for part in text.split("<figure>")]
    own = {
        figure[12:].partition(",")[0]: figure
        for figure in figures
        if "of the objective dpo; dots: validation" in figure
    }
    assert list(own) == ["rewards", "rewards/accuracies", "logps", "kl"]
    assert re.findall(r'data-name="(\w+)"', own["rewards"]) == ["chosen", "rejected", "margins"]
    assert own["rewards"].count("<circle") == 3 * 2


def test_forgetting_is_drawn_and_said_in_words(make_folder: MakeFolder) -> None:
    for value, words in (
        (0.004, "hardly moved"),
        (0.04, "moved a little"),
        (0.3, "moved noticeably"),
        (2.0, "moved far"),
    ):
        records = [step(n, 1.0) for n in range(1, 9)] + [evaluation(n, 1.0) | {"forgetting": value} for n in (4, 8)]
        text = write_report(make_folder(records, f"run{value}")).read_text()
        assert "Forgetting: how far the model is from the base" in text
        assert re.search(rf"On general texts the model has {words} from the base", text)


# In a browser


def test_hostile_text_is_text(browser: Any, page_file: Path) -> None:
    with shown(browser, page_file) as page:
        assert page.title().endswith(": stopped")
        assert (page.locator("img").count(), page.locator("script").count()) == (0, 1)
        assert "document.title='owned'" in page.locator(".warnings").inner_text()
        page.locator("svg[data-scale]").first.hover()
        told = page.locator(".told").first.inner_text()
        assert re.match(r"\d+: each step [\d.]+ · smoothed [\d.]+ · validation, best ringed [\d.]+$", told), told
        assert "document.title='owned'" in " ".join(page.locator("figcaption").all_inner_texts())
        cells = page.locator(".samples td").all_inner_texts()
        assert len(cells) == 5
        assert all("document.title='owned'" in cell for cell in cells)
        assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_shows_all_of_it_in_either_scheme(browser: Any, page_file: Path, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme, viewport={"width": 400, "height": 800})
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for selector in (
        "h1",
        ".state",
        ".verdict li",
        ".cards dt",
        ".commands code",
        ".facts dt",
        ".warnings li",
        ".legend .c1",
        ".samples td.best",
    ):
        assert contrast(page, selector) >= (4.5 if selector != ".legend .c1" else 3), selector
    page.close()
