"""Ask a trained model: one question, a batch, a stream, a box drawn on its image.

make demo
python examples/unimed_ask.py runs/demo .cache/unimed/sample/images/ct_axial_014.jpg
"""

import sys
from pathlib import Path

from PIL import Image

import unimed
from unimed.inference import draw
from unimed.inference.images import open_source


def main(model: str, image: str, drawn: str = "boxed.png") -> list[unimed.Answer]:
    session = unimed.load(model)  # a GPU where there is one

    # One question. The image may be a path, bytes, a Pillow image or a NumPy array.
    answer = session.answer(Image.open(image), "which plane is shown")
    print(f"vqa: {answer.text} (confidence {answer.confidence:.2f}, mean gates {[round(gate, 2) for gate in answer.gates]})")

    # Many, in batches: each is answered as it would be by itself.
    requests = [unimed.Request(image, "liver", "refer"), unimed.Request(image, "10,10,60,60", "identify"), unimed.Request(image, "", "cls")]
    requests += [unimed.Request(None, "Which organ makes bile?", "qa")]
    answers = session.answer(requests)
    for request, one in zip(requests, answers, strict=True):
        print(f"{one.task}: {request.question} -> {one.text} {one.parsed.kind}")

    # Piece by piece.
    print("caption: ", end="")
    for piece in session.stream(unimed.Request(image, "", "caption")):
        print(piece, end="", flush=True)
    print()

    # A box is in pixels of the file; `draw` maps it to the image that the model saw.
    identified = answers[1]
    draw.save(open_source(image), identified.box, Path(drawn))
    print(f"drawn in {drawn} · {unimed.NOTICE}")
    return [answer, *answers]


if __name__ == "__main__":
    main(*sys.argv[1:])
