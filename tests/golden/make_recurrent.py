"""Write the golden values of tests/nets/test_recurrent.py: tiny random networks, outputs and gradients of torch.

Run it in an environment of its own with torch (it is not a dependency of this project):

    python tests/golden/make_recurrent.py

made with torch 2.13.0 (CPU). In recurrent.npz each case holds
  CASE/weight/NAME   torch's parameters, float16, computed with as float32
  CASE/x [T, N, D], CASE/state [L, directions, N, S H], CASE/lengths [N]   the inputs; sequences are packed
  CASE/y, CASE/final   outputs (0 behind the end) and last states, as the inputs
  CASE/dx, CASE/dstate, CASE/grad/NAME   gradients of sum(y * cos(0, 1, 2, ...)) + sum(final * cos(0, 1, 2, ...))
and COUNT/NAME the number of parameters of larger ones.
"""

from pathlib import Path

import numpy as np
import torch

T, N, D, H = 7, 3, 4, 5
UNEQUAL = (4, 7, 1)
CASES = {  # class, arguments, lengths
    "tanh": (torch.nn.RNN, {"nonlinearity": "tanh"}, (T,) * N),
    "relu": (torch.nn.RNN, {"nonlinearity": "relu", "num_layers": 3}, (T,) * N),
    "lstm": (torch.nn.LSTM, {}, (T,) * N),
    "gru": (torch.nn.GRU, {"num_layers": 2}, UNEQUAL),
    "lstm_both": (torch.nn.LSTM, {"num_layers": 2, "bidirectional": True}, UNEQUAL),
    "gru_both": (torch.nn.GRU, {"num_layers": 2, "bidirectional": True}, (T,) * N),
}
COUNTS = {
    "zaremba_medium": (torch.nn.LSTM, 650),
    "zaremba_large": (torch.nn.LSTM, 1500),
}


def weighed(x):
    """sum(x * cos(0, 1, 2, ...))."""
    return (x.reshape(-1) * torch.cos(torch.arange(x.numel(), dtype=torch.float32))).sum()


def run(make, arguments, lengths, seed):
    """The arrays of one case."""
    net, draw = make(D, H, **arguments), np.random.default_rng(seed)
    weights = {name: draw.normal(0, 0.5, p.shape).astype(np.float16) for name, p in net.named_parameters()}
    net.load_state_dict({name: torch.tensor(w.astype(np.float32)) for name, w in weights.items()}, strict=True)
    directions = 2 if net.bidirectional else 1
    parts = 2 if isinstance(net, torch.nn.LSTM) else 1
    shape = (net.num_layers, directions, N, parts * H)
    state = torch.tensor(draw.normal(0, 0.5, shape).astype(np.float32), requires_grad=True)
    x = torch.tensor(draw.normal(size=(T, N, D)).astype(np.float32), requires_grad=True)
    theirs = tuple(part.reshape(-1, N, H).contiguous() for part in state.split(H, dim=-1))
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, final = net(packed, theirs if parts == 2 else theirs[0])
    y = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=T)[0]
    final = torch.cat(final if parts == 2 else (final,), dim=-1).reshape(shape)
    (weighed(y) + weighed(final)).backward()
    arrays = {"x": x, "state": state, "y": y, "final": final, "dx": x.grad, "dstate": state.grad}
    return (
        {name: array.detach().numpy() for name, array in arrays.items()}
        | {"lengths": np.asarray(lengths)}
        | {f"weight/{name}": value for name, value in weights.items()}
        | {f"grad/{name}": p.grad.numpy() for name, p in net.named_parameters()}
    )


def main():
    print("torch", torch.__version__)
    arrays = {}
    for seed, (case, given) in enumerate(CASES.items()):
        arrays |= {f"{case}/{key}": value for key, value in run(*given, seed).items()}
    for name, (make, width) in COUNTS.items():
        with torch.device("meta"):
            arrays[f"COUNT/{name}"] = sum(p.numel() for p in make(width, width, num_layers=2).parameters())
    path = Path(__file__).parent / "recurrent.npz"
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
