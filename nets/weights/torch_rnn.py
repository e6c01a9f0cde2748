"""The names that torch.nn.RNN, LSTM and GRU give to the parameters of `jaxrl.nets.recurrent.RNN`."""

from jaxrl.nets.recurrent import RNNConfig
from jaxrl.nets.weights.maps import Names, Place

STORED = {
    "weight_ih": ("input/kernel", (1, 0)),
    "weight_hh": ("memory/kernel", (1, 0)),
    "bias_ih": ("input/bias", None),
    "bias_hh": ("memory/bias", None),
}


def names(config: RNNConfig) -> Names:
    """weight_ih_l0, weight_hh_l0_reverse, ... -> places; for `from_checkpoint` of `jaxrl.nets.weights.maps`.

    Raises:
      ValueError: if an LSTM's config has a forget bias beside the weights; torch has none.
    """
    if config.cell == "lstm" and config.forget_bias:
        raise ValueError(f"forget_bias is {config.forget_bias}; torch's LSTM has none beside its weights: set it to 0")
    return {
        f"{theirs}_l{layer}{'_reverse' * (direction == 'backward')}": Place(
            f"{'rest' if layer else 'first'}/{direction}/{ours}", (layer - 1,) if layer else (), axes
        )
        for layer in range(config.layers)
        for direction in config.directions
        for theirs, (ours, axes) in STORED.items()
    }
