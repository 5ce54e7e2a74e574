"""The HTML report in a real browser, where there is one (Debian's package chromium)."""

import math
import re
import shutil
import subprocess

import pytest
import torch

from tests.models import tiny
from transect import Anatomy
from transect.data import Specimen
from transect.probes import KIND, Inspection, Quantity, Result, Table, probing
from transect.probes import registry as registered
from transect.probes.draw import bars, heatmap, lines, scatter
from transect.report import write_report
from transect.store import Folder

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --virtual-time-budget=15000"
)
NASTY = "</script><script>document.title='broken'</script> & <b>bold</b>"


def draw(result):
    values = result["values"]
    return [
        lines("Lines", "A note.", {"a": values[0], NASTY: values[1]}, xlabel="x", ylabel="y"),
        bars("Bars", "A note.", {"a": values[0]}, xlabel="x", ylabel="y"),
        heatmap("Heat", NASTY, values, xlabel="x", ylabel="y", diverging=True),
        scatter("Points", "A note.", {"g": (values[0], values[1])}, xlabel="x", ylabel="y", texts={"g": [NASTY] * 4}),
        Table("Rows", "A note.", ["token", "score", "right"], [[NASTY, 0.5, True], ["plain", math.nan, False]]),
    ]


def folder(path):
    taken = Folder(path, KIND)
    taken.take(among_others=True)
    return taken


@pytest.fixture
def page(tmp_path):
    @probing("scratch", title="A scratch probe", paper="arXiv:0000.00000", draw=draw)
    def scratch(specimen):
        """Scratch <i>it</i>."""

    values = torch.tensor([[0.0, 1.0, float("nan"), 3.0], [1.0, float("inf"), 2.0, -1.0]])
    result = Result(
        {"values": Quantity(values, ("a", "b"), "", "values")}, [NASTY], ["It shows nothing."], {}, "scratch"
    )
    found = Inspection({"scratch": result}, {"other": "It needs text."})
    yield write_report(folder(tmp_path), found, Specimen(Anatomy(tiny("llama")), name="a model"))
    del registered._probes["scratch"]


def test_the_page_is_whole_and_names_nothing_outside_itself(page):
    text = page.read_text()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)
    assert cells[-6:][1:3] == ["0.5", "yes"] and cells[-3:] == ["plain", "", "no"]  # a gap for what is no number
    assert "a model" in text and "A scratch probe" in text and "It needs text." in text and "It shows nothing." in text
    assert "https://arxiv.org/abs/0000.00000" in text and "&lt;i&gt;" in text
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.S)  # plotly's own source names its home page
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//(?!arxiv\.org)""", own)
    assert NASTY not in text


def test_every_type_that_weights_have_is_named(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16)
    model.model.norm.float()
    text = write_report(folder(tmp_path), Inspection({}, {}), Specimen(Anatomy(model))).read_text()
    assert "bfloat16, float32" in text


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_draws_everything_in_a_browser_without_an_error(page, tmp_path, theme):
    if theme == "dark":
        page.write_text(page.read_text().replace("<html ", '<html data-theme="dark" ', 1))
    picture = tmp_path / "picture.png"
    asked = ["--dump-dom", "--window-size=1280,2400", f"--screenshot={picture}"]
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", *asked, f"file://{page}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 'data-ready="true"' in run.stdout, run.stderr[-2000:]
    assert "CONSOLE" not in run.stderr
    assert run.stdout.count('class="main-svg"') >= 4 and "<title>a model - Transect</title>" in run.stdout
    assert "bold</b>" not in re.sub(r"<script.*?</script>", "", run.stdout, flags=re.S)
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert (pixels[5, -5].mean() > 0.9) == (theme == "light")
    assert len(pixels.reshape(-1, 3)[::97].round(1).tolist()) and pixels.std() > 0.05
