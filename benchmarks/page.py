"""How large the page of a run is, and how soon a browser shows it: maps of many points, with an image for each.

    python benchmarks/page.py --images DATA/cifar10/test --points 10000

--images: a folder with image files below it; without it, the images are noise, which no codec makes small. Prints
the bytes of the page and of its thumbnails, the time to write it, and for each of --repeats openings in headless
Chromium the time from the start of navigation to the first paint, to the first drawn map and to the last widget.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from hpc_supcon import run_folder
from hpc_supcon.config import load_config
from hpc_supcon.pages.page import render, write_page
from hpc_supcon.pages.runs import page_of_runs
from hpc_supcon.pages.thumbnails import WEBP, write_thumbnails

MAPS = [f"{when}{space}-{method}" for when in ("", "initial-") for space in ("encoder", "projection") for method in
        ("pca", "tsne", "umap")]  # fmt: skip
TIMES = """() => new Promise((done) => {
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  if (paint) done(paint.startTime);
  new PerformanceObserver((list) => done(list.getEntries()[0].startTime)).observe({ type: "paint", buffered: true });
})"""


def make_run(folder: Path, images: np.ndarray, classes: list[str], labels: np.ndarray) -> None:
    """A run folder with 12 maps of as many points as images, 2000 steps of curves and a confusion matrix."""
    run_folder.create(folder, load_config("quickstart", [f"run_dir={folder}"]))
    rng, n = np.random.default_rng(0), len(images)
    (folder / "embeddings").mkdir()
    for name in MAPS:
        centers = 20 * rng.normal(size=(len(classes), 2))
        points = (centers[labels] + 3 * rng.normal(size=(n, 2))).astype(np.float32)
        arrays = {"points": points, "index": np.arange(n), "labels": labels, "classes": np.array(classes)}
        np.savez(folder / f"embeddings/{name}.npz", **arrays)
    write_thumbnails(folder / "embeddings", images, np.arange(n))
    lines = [{"event": "start", "step": 0, "time": 0.0, "train_images": 50_000, "steps_per_epoch": 195}]
    for step in range(1, 2001):
        noise = {key: float(rng.normal()) for key in ("loss", "lr", "grad_norm", "images_per_s", "mean_similarity")}
        lines.append({"event": "train", "step": step, "time": float(step), **noise})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    confusion = rng.integers(0, 30, size=(len(classes), len(classes))) + 900 * np.eye(len(classes), dtype=int)
    split = {"samples": n, "accuracy": 0.9, "accuracy_interval": [0.89, 0.91], "confusion": confusion.tolist()}
    run_folder.add_scores(folder, "probes", "linear", {"classes": classes, "splits": {"test": split}})


def open_page(browser: Browser, path: Path) -> tuple[float, float, float]:
    """Milliseconds from the start of navigation to the first paint, the first map, and the last widget."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.add_init_script(
        """addEventListener("DOMContentLoaded", () => { window.firstMap = performance.now(); });
        const wait = setInterval(() => {
          if (document.querySelector("#confusion canvas")) { window.last = performance.now(); clearInterval(wait); }
        }, 1);"""
    )
    page.goto(f"file://{path}")
    page.wait_for_function("window.last !== undefined")
    paint = page.evaluate(TIMES)
    found = paint, page.evaluate("window.firstMap"), page.evaluate("window.last")
    page.context.close()
    return found


def read_images(folder: Path | None, n: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """(uint8 [n, 3, 32, 32], classes, labels); the classes are the folders."""
    if folder is None:
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 256, size=(n, 3, 32, 32), dtype=np.uint8)
        return noise, [str(i) for i in range(10)], rng.integers(10, size=n)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:n]]
    classes = sorted({path.parent.name for path in paths})
    images = [np.asarray(Image.open(p).convert("RGB").resize((32, 32))).transpose(2, 0, 1) for p in paths]
    return np.stack(images), classes, np.array([classes.index(path.parent.name) for path in paths])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--keep", type=Path, help="where the page is left")
    arguments = parser.parse_args()
    images, classes, labels = read_images(arguments.images, arguments.points)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder, path = Path(scratch) / "run", Path(scratch) / "page.html"
        began = time.perf_counter()
        make_run(folder, images, classes, labels)
        made = time.perf_counter()
        write_page(path, render(page_of_runs([folder])))
        print(f"{len(images):,} points in {len(MAPS)} maps, {len(images):,} images of 32 x 32")
        print(f"thumbnails and maps written in {made - began:.1f} s, the page in {time.perf_counter() - made:.2f} s")
        webp = (folder / "embeddings" / WEBP).stat().st_size
        print(f"page {path.stat().st_size / 1e6:.2f} MB, thumbnails {webp / 1e6:.2f} MB")
        executable = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        times = [open_page(browser, path) for _ in range(arguments.repeats)]
        n, columns = arguments.repeats, zip(*times, strict=True)
        print(f"Chromium {browser.version}, {platform.machine()}, {n} openings: median (lowest, highest)")
        for name, found in zip(("first paint", "first map drawn", "last widget drawn"), columns, strict=True):
            print(f"  {name:18} {statistics.median(found):6.0f} ms ({min(found):.0f}, {max(found):.0f})")
        browser.close()
        if arguments.keep:
            shutil.copy(path, arguments.keep)


if __name__ == "__main__":
    main()
