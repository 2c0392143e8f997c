"""A LLaVA-like model in plain torch: image patches -> CMoE connector -> prefix of a small causal language model.

An image shows one coloured square. Task "colour" asks for its colour, task "place" for its quadrant; the question itself is the same, so
that only the connector, which routes by task, can tell the language model what to look for.

    python examples/llava_like.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmoe_kernels import CMoEConfig, CMoEConnector

TASKS, WORDS = ("colour", "place"), ("<bos>", "red", "green", "blue", "top left", "top right", "bottom left", "bottom right")


class LlavaLike(nn.Module):
    def __init__(self, width: int = 64, patch: int = 4) -> None:
        super().__init__()
        self.vision = nn.Conv2d(3, 32, patch, patch)  # stands for a pretrained encoder
        self.connector = CMoEConnector(
            CMoEConfig(
                in_features=32,
                out_features=width,
                num_experts=3,
                tasks=TASKS,
                resample_rate=4,
                router_features=64,
                aux_losses={"importance": 0.01},
            )
        )
        self.words = nn.Embedding(len(WORDS), width)
        self.places = nn.Embedding(64, width)
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(WORDS))

    def forward(self, images: Tensor, tasks: list[str], tokens: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.vision(images).flatten(2).transpose(1, 2)  # [B, P, C]
        prefix = self.connector(patches, task=tasks)  # embeddings [B, P / 4, width]
        x = torch.cat([prefix.embeddings, self.words(tokens)], dim=1)
        x = x + self.places.weight[: x.shape[1]]
        x = self.blocks(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]), is_causal=True)
        return self.head(x[:, prefix.embeddings.shape[1] :]), prefix.aux_loss


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, list[str], Tensor, Tensor]:
    colour, place, task = (torch.randint(0, n, (size,), generator=generator) for n in (3, 4, 2))
    images = torch.zeros(size, 3, 16, 16)
    for i, (c, p) in enumerate(zip(colour.tolist(), place.tolist(), strict=True)):
        images[i, c, p // 2 * 8 : p // 2 * 8 + 8, p % 2 * 8 : p % 2 * 8 + 8] = 1
    answers = torch.where(task == 0, 1 + colour, 4 + place)
    return images, [TASKS[t] for t in task.tolist()], torch.zeros(size, 1, dtype=torch.int64), answers


def main(steps: int = 300) -> tuple[float, float]:
    """Train; returns the first loss and the share of right answers on new images."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = LlavaLike()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    first = 0.0
    for step in range(steps):
        images, tasks, tokens, answers = batch(64, generator)
        logits, aux_loss = model(images, tasks, tokens)
        loss = F.cross_entropy(logits[:, -1], answers) + aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss.item():.3f}")
    images, tasks, tokens, answers = batch(256, generator)
    with torch.no_grad():
        right = (model(images, tasks, tokens)[0][:, -1].argmax(-1) == answers).float().mean().item()
    print(f"right answers on new images: {right:.0%}")
    return first, right


if __name__ == "__main__":
    main()
