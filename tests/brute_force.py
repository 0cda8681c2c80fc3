"""The losses written as in the papers' formulas, one anchor and one pair at a time, in float64.

The loss tests compare with these: they have no vectorized algebra and share nothing with hpc_supcon.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _rows(features: Tensor, labels: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """Unit rows, one per view, and the label of each: the index of its image where there are no labels."""
    if features.ndim == 2:
        features = features[:, None, :]
    rows, row_labels = [], []
    for b in range(features.shape[0]):
        for v in range(features.shape[1]):
            x = features[b, v].double()
            rows.append(x / x.pow(2).sum().sqrt())
            row_labels.append(b if labels is None else int(labels[b]))
    return rows, row_labels


def contrastive(features, labels, tau, form="out", k1=0.0, k2=1.0, queue=None, keys=None):
    """Mean over anchors with a positive of the per-anchor loss; differentiable by autograd.

    out: -1/|P| sum_p log( exp(s_ip) / sum_A exp(s_ia) )       (Khosla et al., equation 2)
    in:  -log( 1/|P| sum_p exp(s_ip) / sum_A exp(s_ia) )       (Khosla et al., equation 3)
    tcl: -1/|P| sum_p log( exp(s_ip) / D_i )                   (Animesh and Chandraker, equation 8)
    decoupled: -1/|P| sum_p log( exp(s_ip) / sum_N exp(s_in) )

    keys: another model's embeddings of the same views, which anchors are compared with in place of each other.
    """
    anchors, row_labels = _rows(features, labels)
    rows = anchors if keys is None else _rows(keys.detach(), labels)[0]
    if queue is not None:
        past, past_labels = _rows(queue[0].detach(), queue[1])
        rows, row_labels = rows + past, row_labels + past_labels
    losses = []
    for i, anchor in enumerate(anchors):
        positives = [j for j in range(len(rows)) if j != i and row_labels[j] == row_labels[i]]
        negatives = [j for j in range(len(rows)) if row_labels[j] != row_labels[i]]
        if positives:
            losses.append(_anchor_loss(anchor, rows, positives, negatives, tau, form, k1, k2))
    return sum(losses) / len(losses) if losses else 0.0 * features.double().sum()


def _anchor_loss(anchor, rows, positives, negatives, tau, form, k1, k2):
    def s(j):
        return (anchor * rows[j]).sum() / tau

    everyone = positives + negatives
    if form == "in":
        ratio = sum(torch.exp(s(p)) for p in positives) / sum(torch.exp(s(a)) for a in everyone)
        return -torch.log(ratio / len(positives))
    if form == "out":
        denominator = sum(torch.exp(s(a)) for a in everyone)
    elif form == "tcl":
        denominator = sum(torch.exp(s(p)) for p in positives)
        denominator = denominator + k1 * sum(torch.exp(-(anchor * rows[p]).sum()) for p in positives)
        denominator = denominator + k2 * sum(torch.exp(s(n)) for n in negatives)
    else:
        denominator = sum(torch.exp(s(n)) for n in negatives)
    return -sum(s(p) - torch.log(denominator) for p in positives) / len(positives)


def value_and_gradient(features, *args, **kwargs):
    """(loss, d loss / d features) of `contrastive`, both float64."""
    x = features.detach().double().requires_grad_()
    loss = contrastive(x, *args, **kwargs)
    loss.backward()
    return loss.detach(), x.grad


def responses(features, labels, tau, k1, k2):
    """Per anchor with positives: (list over P of X_ip - P_ip + Y_ip, list over N of P_in), lemma 2 of TCL."""
    rows, row_labels = _rows(features, labels)
    out = []
    for i in range(len(rows)):
        dots = [float((rows[i] * row).sum()) for row in rows]
        positives = [j for j in range(len(rows)) if j != i and row_labels[j] == row_labels[i]]
        negatives = [j for j in range(len(rows)) if row_labels[j] != row_labels[i]]
        if not positives:
            continue
        d = sum(math.exp(dots[p] / tau) + k1 * math.exp(-dots[p]) for p in positives)
        d += k2 * sum(math.exp(dots[n] / tau) for n in negatives)
        pulls = [
            1 / len(positives) - math.exp(dots[p] / tau) / d + tau * k1 * math.exp(-dots[p]) / d for p in positives
        ]
        out.append((pulls, [k2 * math.exp(dots[n] / tau) / d for n in negatives]))
    return out


def _column(z, v, i):
    """Dimension i of view v of every image, as a list."""
    return [z[b, v, i] for b in range(len(z))]


def _mean(values):
    return sum(values) / len(values)


def _products(a, b):
    """The sum over images of the product of two dimensions, each less its mean."""
    return sum((x - _mean(a)) * (y - _mean(b)) for x, y in zip(a, b, strict=True))


def barlow_twins(z, weight):
    """Sum of (1 - C_ii)^2 + weight sum of C_ij^2 (Zbontar et al., equations 1 and 2), eps of the authors 1e-5."""
    n, _, dim = z.shape
    loss = 0.0
    for i in range(dim):
        for j in range(dim):
            a, b = _column(z, 0, i), _column(z, 1, j)
            c = _products(a, b) / n / ((_products(a, a) / n + 1e-5) * (_products(b, b) / n + 1e-5)).sqrt()
            loss = loss + ((1 - c) ** 2 if i == j else weight * c**2)
    return loss


def vicreg(z, invariance, variance, covariance):
    """lambda s(Z, Z') + mu [v(Z) + v(Z')] + nu [c(Z) + c(Z')] (Bardes et al., equation 6)."""
    n, _, dim = z.shape
    loss = invariance * _mean([(z[b, 0, i] - z[b, 1, i]) ** 2 for b in range(n) for i in range(dim)])
    for v in range(2):
        columns = [_column(z, v, i) for i in range(dim)]
        stds = [(_products(a, a) / (n - 1) + 1e-4).sqrt() for a in columns]
        loss = loss + variance * _mean([torch.relu(1 - s) for s in stds])
        pairs = [(a, b) for a in range(dim) for b in range(dim) if a != b]
        loss = loss + covariance * sum((_products(columns[a], columns[b]) / (n - 1)) ** 2 for a, b in pairs) / dim
    return loss


def _unit(row):
    return row / row.pow(2).sum().sqrt()


def simsiam(p, z):
    """D(p1, stopgrad z2) / 2 + D(p2, stopgrad z1) / 2 (Chen and He, equation 4)."""
    z = z.detach()
    halves = [-(_unit(p[b, v]) * _unit(z[b, 1 - v])).sum() / 2 for b in range(len(p)) for v in range(2)]
    return sum(halves) / len(p)


def byol(p, z):
    """|p1 - z2|^2 + |p2 - z1|^2 of unit rows (Grill et al., equation 2 and the symmetric loss)."""
    z = z.detach()
    return _mean([sum((_unit(p[b, v]) - _unit(z[b, 1 - v])).pow(2).sum() for v in range(2)) for b in range(len(p))])


def moco(q, k, queue, tau):
    """Mean over views of -log(exp(q.k / tau) / (exp(q.k / tau) + sum_queue exp(q.k_j / tau))) (He et al., eq. 1)."""
    k, losses = k.detach(), []
    for b in range(len(q)):
        for v in range(2):
            query = _unit(q[b, v])
            positive = torch.exp((query * _unit(k[b, 1 - v])).sum() / tau)
            negatives = sum(torch.exp((query * past).sum() / tau) for past in queue[1 - v])
            losses.append(-torch.log(positive / (positive + negatives)))
    return _mean(losses)


def swav(z, prototypes, tau, epsilon=0.05, iterations=3, *, given=None, queue=None):
    """Mean over global views of -sum_k q_k log p_k, q by rounds of Sinkhorn-Knopp (Caron et al., equation 2).

    given: number of global views, whose codes all other views predict; None: all. queue: by global view, embeddings
    that are assigned together with the batch's.
    """
    n, views, _ = z.shape
    given = views if given is None else given
    k = len(prototypes)
    scores = [[[(_unit(z[b, v]) * _unit(c)).sum() for c in prototypes] for b in range(n)] for v in range(views)]
    losses = []
    for v in range(given):
        rows = [[float(s.detach()) for s in row] for row in scores[v]]
        if queue is not None:
            rows += [[float((past * _unit(c.detach())).sum()) for c in prototypes] for past in queue[v]]
        q = [[math.exp(s / epsilon) for s in row] for row in rows]
        for _ in range(iterations):
            shares = [sum(row[j] for row in q) for j in range(k)]
            q = [[row[j] / shares[j] / k for j in range(k)] for row in q]
            q = [[x / sum(row) / len(q) for x in row] for row in q]
        for other in range(views):
            for b in range(n if other != v else 0):
                exps = [torch.exp(s / tau) for s in scores[other][b]]
                losses.append(-sum(len(q) * q[b][j] * torch.log(exps[j] / sum(exps)) for j in range(k)))
    return _mean(losses)


def dino(z, target, prototypes, teacher_prototypes, center, tau, teacher_tau):
    """Mean over pairs of -sum_k P_t log P_s (Caron et al. 2021, algorithm 1); no pair of a view with itself."""
    losses, target = [], target.detach()
    for b in range(len(z)):
        for g in range(target.shape[1]):
            t = torch.stack([(_unit(target[b, g]) * _unit(c)).sum() for c in teacher_prototypes])
            p_t = torch.softmax((t - center) / teacher_tau, dim=0)
            for v in range(z.shape[1]):
                if v != g:
                    s = torch.stack([(_unit(z[b, v]) * _unit(c)).sum() for c in prototypes])
                    losses.append(-(p_t * torch.log_softmax(s / tau, dim=0)).sum())
    return _mean(losses)
