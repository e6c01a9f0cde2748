"""Masked-token pre-training in float64, written from the papers: loops over rows and tokens."""

import math

import numpy as np


def sentence_pair(logits, labels):
    out = []
    for row, label in zip(np.asarray(logits, float), labels, strict=True):
        out.append(-row[label] + math.log(sum(math.exp(x) for x in row)))
    return np.array(out)


def replaced_tokens(logits, is_replaced):
    out = np.zeros(np.shape(logits))
    for at in np.ndindex(out.shape):
        p = 1 / (1 + math.exp(-float(logits[at])))
        out[at] = -math.log(p if is_replaced[at] else 1 - p)
    return out


def count(n, share):
    """BERT's number of predictions of a row with n candidates."""
    return min(n, max(1, round(share * n))) if n else 0


def masked_loss(logits, targets, chosen):
    """Mean over the chosen tokens of -log p."""
    total, number = 0.0, 0
    for b, t in np.ndindex(np.shape(targets)):
        if chosen[b, t]:
            row = np.asarray(logits[b, t], float)
            total += math.log(np.exp(row - row.max()).sum()) + row.max() - row[targets[b, t]]
            number += 1
    return total / number


def is_part(segment, document):
    """Does the segment, perhaps cut at both ends, stand in the document's tokens?"""
    flat = [token for sentence in document for token in sentence]
    segment = list(segment)
    return any(flat[i : i + len(segment)] == segment for i in range(len(flat) - len(segment) + 1))
