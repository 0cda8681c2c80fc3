"""The numbers of a run by section and name, from results.json and scores.json."""

from __future__ import annotations

from typing import Any

from .read import Run, mapping, number

SPLITS = ("test", "validation", "train")
NAMES = {
    "accuracy": "accuracy", "top5": "top-5", "balanced_accuracy": "balanced accuracy", "f1": "F1",
    "precision": "precision", "recall": "recall", "f1_weighted": "weighted F1",
    "precision_weighted": "weighted precision", "recall_weighted": "weighted recall", "ece": "ECE", "nll": "NLL",
    "alignment": "alignment", "uniformity": "uniformity", "silhouette": "silhouette",
    "intra_inter": "intra/inter distance", "nmi": "NMI", "ari": "ARI", "effective_rank": "effective rank",
    "recall_at_1": "recall@1", "recall_at_5": "recall@5", "recall_at_10": "recall@10",
    "r_precision": "R-precision", "map_at_r": "MAP@R", "auroc": "AUROC", "fpr95": "FPR at 95 % TPR",
    "sparse_mb": "size (MB)", "ratio": "ratio", "knn": "kNN", "clean": "clean error", "mce": "mean corruption error",
    "mae": "MAE", "mse": "MSE",
}  # fmt: skip
"""Of every score, its name in tables, in their order."""


SCORES_OF_PRUNING = ("sparse_mb", "ratio", "accuracy", "f1", "knn", "silhouette")


def name_of(score: str) -> str:
    return NAMES.get(score, score.replace("_", " "))


def ordered(scores: set[str]) -> list[str]:
    """In the order of NAMES, others after them."""
    known = list(NAMES)
    return sorted(scores, key=lambda s: (known.index(s) if s in NAMES else len(known), s))


def is_pruned(result: dict[str, Any]) -> bool:
    """Whether an entry of results.json is of a pruned copy of the run's encoder."""
    return number(mapping(result.get("prune")).get("rate")) is not None


def probe_label(result: dict[str, Any]) -> str:
    """`linear`, or `linear, pruned l1 0.5`."""
    label = str(result.get("probe") or result.get("stage") or "result")
    pruned = mapping(result.get("prune"))
    rate = number(pruned.get("rate"))
    if rate is None:
        return label
    unusual = (("scope", "global"), ("schedule", "oneshot"), ("label", None))
    more = [str(pruned[key]) for key, usual in unusual if pruned.get(key) not in (None, usual)]
    return " ".join([f"{label}, pruned {pruned.get('method', '')} {rate:g}", *more])


def split_scores(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    """(probe, split) -> its scores: of results.json, and what scores.json has besides (intervals, confusion)."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in run.results:
        for split in SPLITS:
            scores = mapping(result.get(split))
            if scores:
                size = mapping(result.get("size"))
                dense, sparse = (
                    number(size.get("original_bytes", size.get("dense_bytes"))),
                    number(size.get("sparse_bytes")),
                )
                extra = {"sparse_mb": sparse / 1e6, "ratio": dense / sparse} if dense and sparse else {}
                if split == "test":
                    features = mapping(result.get("features"))
                    extra |= {k: v for k in ("knn", "silhouette") if (v := number(features.get(k))) is not None}
                found.setdefault((probe_label(result), split), {}).update(scores | extra)
    for kind, entry in mapping(run.scores.get("probes")).items():
        for split, scores in mapping(mapping(entry).get("splits")).items():
            found.setdefault((kind, split), {}).update(mapping(scores))
    order = {split: i for i, split in enumerate(SPLITS)}
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    return dict(sorted(found.items(), key=lambda item: (kinds.index(item[0][0]), order.get(item[0][1], 3))))


def sections_of(run: Run) -> dict[str, dict[str, float]]:
    """section -> score -> number: everything that can be compared between runs."""
    sections = {f"{kind}, {split}": _scores(scores) for (kind, split), scores in split_scores(run).items()}
    for space, scores in mapping(run.scores.get("embedding")).items():
        sections[f"embedding, {space}"] = _scores(mapping(scores))
    for data, detectors in mapping(run.scores.get("ood")).items():
        for detector, scores in mapping(detectors).items():
            sections[f"out of distribution, {data}, {detector}"] = _scores(mapping(scores))
    for kind, scores in mapping(run.scores.get("corruptions")).items():
        sections[f"corruptions, {kind}"] = _scores(mapping(scores))
    return {name: scores for name, scores in sections.items() if scores}


def _scores(scores: dict[str, Any]) -> dict[str, float]:
    found = {name: number(value) for name, value in scores.items() if name != "samples"}
    return {name: value for name, value in found.items() if value is not None}
