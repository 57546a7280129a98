"""Operations of the project's own flow, each with a reference in plain torch. kernels/README.md: what may enter."""

from sicog_kernels.normalise import normalise_patches

__all__ = ["normalise_patches"]
