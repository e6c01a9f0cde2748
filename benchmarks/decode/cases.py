"""Steps of decoding that every form makes; standard library only."""

import dataclasses

HEADS, KEY_HEADS, SIZE, PAGE = 8, 2, 64, 16


@dataclasses.dataclass(frozen=True)
class Case:
    """One token for each of `rows` rows over caches of `length`, float32: all full, or filled from little to full."""

    rows: int
    length: int
    ragged: bool

    def lengths(self) -> list[int]:
        """Tokens in each row's cache."""
        if not self.ragged:
            return [self.length] * self.rows
        return [self.length * (2 * row + 1) // (2 * self.rows) for row in range(self.rows)]


CASES = {
    f"{rows}x{length}{'-ragged' if ragged else ''}": Case(rows, length, ragged)
    for rows in (1, 8, 32)
    for length in (512, 2048, 8192)
    for ragged in (False, True)
}
