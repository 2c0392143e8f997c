"""How the tables write numbers."""


def ratio_text(ratio: float) -> str:
    """Two digits and more; a loss is bold."""
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
    return f"**{text}**" if ratio < 1 else text


def milliseconds(value: float) -> str:
    """Three digits; all of them above a second."""
    return f"{value:.3f}" if value < 1 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def days(dates: list[str]) -> str:
    """The day of all dates and times, or the first and the last."""
    first, last = min(dates)[:10], max(dates)[:10]
    return first if first == last else f"{first} to {last}"
