"""Multi-token prediction from the paper (arXiv 2412.19437, section 2.2), by loops in float64.

The loss: which token each column of each depth predicts, and the sum of equations 24 and 25.
"""

import numpy as np


def loss(log_probs, ids, mask, segments, weight):
    """log_probs[k][b][i] = log p of the token k + 1 further than column i, any number where there is none.

    Returns (total, weight): the sum over next tokens, weight / D times the sums of the further ones added, and the
    number of next tokens.
    """
    depths, (rows, width) = len(log_probs), ids.shape
    sums, number = [0.0] * depths, 0
    for k in range(depths):
        for b in range(rows):
            for i in range(width - 1):
                t = i + k + 1
                if t >= width or mask[b, t] == 0:
                    continue
                if segments is not None and segments[b, t] != segments[b, i]:
                    continue
                sums[k] -= float(log_probs[k][b][i])
                number += k == 0
    further = weight / (depths - 1) * sum(sums[1:]) if depths > 1 else 0.0
    return sums[0] + further, number


def rms(x, scale, eps):
    """RMSNorm of the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def entry(params, k, hidden, following, eps):
    """What the block of module k sees, [T, D]: one row at a time. following: embeddings of the tokens k further on."""
    out = []
    for h, e in zip(hidden, following, strict=True):
        both = np.concatenate([rms(e, params["enorm"]["scale"][k], eps), rms(h, params["hnorm"]["scale"][k], eps)])
        out.append(both @ params["eh_proj"]["kernel"][k])
    return np.stack(out)
