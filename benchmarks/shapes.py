"""The one table of shapes. Letters: D in, H hidden, O out, E experts, K experts per token, R router hidden, S task token, T tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a connector or of one mixture-of-experts layer."""

    name: str
    D: int
    H: int
    O: int  # noqa: E741  (the letter of DESIGN's shape comments)
    E: int
    K: int
    R: int
    S: int
    gated: bool
    source: str

    @property
    def expert_weights(self) -> int:
        """Elements of all experts' matrices."""
        return self.E * ((2 if self.gated else 1) * self.H * self.D + self.O * self.H)

    @property
    def expert_biases(self) -> int:
        return 0 if self.gated else self.E * (self.H + self.O)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("released", 5632, 4096, 4096, 5, 2, 45056, 5632, False, "Uni-Med's released connector: soft router on [task ; token]"),
        Shape("cumo", 2048, 4096, 4096, 4, 2, 8192, 2048, False, "CuMo's connector: two-layer experts with biases, top 2 of 4"),
        Shape("mixtral", 4096, 4096, 4096, 8, 2, 16384, 4096, True, "a Mixtral-like square layer: gated, no biases, top 2 of 8"),
        Shape("tiny", 64, 96, 32, 5, 2, 128, 48, False, "for tests of the driver"),
        Shape("tiny_gated", 64, 96, 64, 5, 2, 128, 64, True, "for tests of the driver"),
    )
}
TINY = ("tiny", "tiny_gated")
TOKENS = (1, 64, 256, 1024)
