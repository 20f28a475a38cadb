"""Training in a notebook: with a stand-in of its display, and in a real kernel where one is installed."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.training import notebook
from mlx_sft.training.callbacks import Callback, Record, TrainingRun


class Display:
    """What a notebook shows: the newest content of each display."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.changes = 0

    def display(self, content: str, *, display_id: bool) -> Display:
        assert display_id
        self.shown.append(content)
        return self

    def update(self, content: str) -> None:
        self.changes += 1
        self.shown[-1] = content


class Failing(Callback):
    name = "failing"

    def on_step(self, run: TrainingRun, record: Record) -> None:
        if record["step"] == 3:
            raise UserError("told to fail")


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Display:
    found = Display()
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=found.display, HTML=str))
    # Rich looks for a notebook itself, and would want more of one than this.
    monkeypatch.setattr("rich.console._is_jupyter", lambda: False)
    return found


def test_one_display_with_a_bar_and_a_curve_takes_the_place_of_the_lines(
    settings: dict[str, Any], display: Display, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notebook, "_EVERY", 0.0)
    train(TrainConfig(**settings | {"quiet": False, "valid_fraction": 0.2, "eval_every": 2, "max_steps": 6}))
    (shown,) = display.shown
    assert display.changes == 7
    assert '<progress value="6" max="6">' in shown
    assert shown.count("<polyline") == 3
    assert "step 6/6  loss" in shown
    said = capsys.readouterr().err
    assert "step 6/6" not in said
    assert "validation loss" in said


def test_the_display_of_a_run_that_fails_and_goes_on_shows_all_of_it(
    settings: dict[str, Any], display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = settings | {"quiet": False}
    with pytest.raises(UserError, match="told to fail"):
        train(TrainConfig(**loud), callbacks=[Failing()])
    assert '<progress value="3" max="6">' in display.shown[-1]
    train(TrainConfig.resolve(resume=settings["out"], quiet=False))
    assert len(display.shown) == 2
    assert '<progress value="6" max="6">' in display.shown[-1]
    points = display.shown[-1].partition('<polyline points="')[2].partition('"')[0]
    assert len(points.split()) == 6


def test_a_quiet_run_shows_none(settings: dict[str, Any], display: Display) -> None:
    train(TrainConfig(**settings))
    assert display.shown == []


def test_elsewhere_there_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not notebook.is_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not notebook.is_notebook()


@pytest.mark.filterwarnings("ignore")
def test_a_real_kernel_shows_one_display(settings: dict[str, Any]) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    given = settings | {"quiet": False}
    cell = nbformat.v4.new_code_cell(f"from mlx_sft import TrainConfig, train\ntrain(TrainConfig(**{given!r})).steps")
    notebook_of_one = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook_of_one, kernel_name="python3", timeout=300).execute()
    shown = [o["data"]["text/html"] for o in cell["outputs"] if "mlx-sft" in o.get("data", {}).get("text/html", "")]
    assert len([one for one in shown if "<progress" in one]) == 1
    assert '<progress value="6" max="6">' in shown[-1]
    assert "step 6/6" in shown[-1]
    assert any(o.get("data", {}).get("text/plain") == "6" for o in cell["outputs"])
