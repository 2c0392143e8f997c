"""Which values are shown as black and as white, where the file does not say it itself."""

import numpy as np

CT_WINDOW = (-160.0, 240.0)  # HU, soft tissue
MR_PERCENTILE = 99.5
AIR_HU = -500  # values this low are CT, where the modality is unknown
PROJECTIONS = ("CR", "DX", "MG", "IO", "PX", "RG")  # radiographs: no natural zero, and a rim of extreme values


def finite(values: np.ndarray) -> np.ndarray:
    """The values that are numbers."""
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        return values[np.isfinite(values)]
    return values


def grey_range(values: np.ndarray, modality: str = "") -> tuple[float, float]:
    """(black, white) for values of a modality ("" is unknown).

    CT: soft tissue. Radiographs: 1st to 99th percentile. Others: 0 to the 99.5th percentile, and from the 0.5th where that lies well below
    zero (normalised MR). Where these meet: lowest to highest value.
    """
    values = finite(values)
    if not values.size:
        return 0.0, 0.0
    if modality == "CT" or (not modality and float(values.min()) <= AIR_HU):
        return CT_WINDOW
    if modality in PROJECTIONS:
        low, high = (float(np.percentile(values, share)) for share in (1, 99))
    else:
        low, high = 0.0, float(np.percentile(values, MR_PERCENTILE))
        bottom = float(np.percentile(values, 100 - MR_PERCENTILE))
        if bottom < -0.05 * abs(high):
            low = bottom
    return (low, high) if low < high else (float(values.min()), float(values.max()))


def window(data: np.ndarray, low: float, high: float) -> np.ndarray:
    """Grey values uint8: low and below 0, high and above 255; NaN (nothing was imaged) is 0."""
    scaled = (data.astype(np.float32) - low) / max(high - low, 1e-6)
    return np.rint(np.nan_to_num(np.clip(scaled, 0, 1)) * 255).astype(np.uint8)
