"""PyTorch's scaled_dot_product_attention: python benchmarks/attention/with_torch.py causal-1x2048 both"""

import argparse
import json

import cases
import torch
from torch.nn.functional import scaled_dot_product_attention


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=cases.CASES)
    parser.add_argument("which", choices=cases.PASSES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = cases.CASES[options.case]
    shape = (case.rows, cases.HEADS, case.length, cases.SIZE)
    q, k, v, weights = (torch.randn(shape, requires_grad=options.which == "both") for _ in range(4))

    def call():
        o = scaled_dot_product_attention(q, k, v, is_causal=case.causal)
        if options.which == "both":
            torch.autograd.grad((o * weights.detach()).sum(), (q, k, v))

    print(json.dumps({"library": "torch", "case": options.case, "pass": options.which, **cases.timed(call)}))


if __name__ == "__main__":
    main()
