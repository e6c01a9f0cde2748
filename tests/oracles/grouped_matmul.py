"""Products of groups of rows and a whole expert layer, row by row and token by token in float64."""

import numpy as np


def grouped_matmul(x, w, group_sizes, dy):
    """y, dx and dw of one call: row i times the matrix of the group that it falls into, zeros after the last."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((x.shape[0], w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    row = 0
    for group, size in enumerate(group_sizes):
        for _ in range(size):
            y[row] = sum((x[row, k] * w[group, k] for k in range(x.shape[1])), np.zeros(w.shape[2]))
            dx[row] = sum((dy[row, n] * w[group, :, n] for n in range(w.shape[2])), np.zeros(x.shape[1]))
            dw[group] += np.outer(x[row], dy[row])
            row += 1
    return y, dx, dw


def expert_layer(x, experts, weights, w_in, w_out):
    """y_t = sum_j weights_tj tanh(x_t w_in[e]) w_out[e] with e = experts_tj; ids that are no expert add nothing."""
    x, weights, w_in, w_out = (np.asarray(a, np.float64) for a in (x, weights, w_in, w_out))
    y = np.zeros_like(x)
    for t, j in np.ndindex(*np.shape(experts)):
        e = experts[t][j]
        if 0 <= e < w_in.shape[0]:
            y[t] += weights[t, j] * (np.tanh(x[t] @ w_in[e]) @ w_out[e])
    return y


def ragged_all_to_all(operands, outputs, input_offsets, send_sizes, output_offsets):
    """What every device holds afterwards: device s writes send_sizes[s][d] rows of its own, from input_offsets[s][d]
    on, into the output of device d from output_offsets[s][d] on."""
    outputs = [np.array(x) for x in outputs]
    for s, d in np.ndindex(len(operands), len(operands)):
        for n in range(send_sizes[s][d]):
            outputs[d][output_offsets[s][d] + n] = operands[s][input_offsets[s][d] + n]
    return outputs
