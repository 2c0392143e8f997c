"""MiniGPT-4 style: a frozen vision encoder and a frozen language model, and the connector between them as the only thing that trains.

As in MiniGPT-4 and Uni-Med, four neighbouring image tokens are joined into one, and the image stands inside the prompt:
"<Img> [image tokens] </Img> [task] question". Both frozen parts are transformers models of random weights here; put pretrained ones in
their place (Uni-Med: EVA-CLIP ViT-g, which is Blip2VisionModel, and LLaMA-2 7B with LoRA).

    python examples/minigpt4_style.py
"""

import torch
from torch import Tensor, nn
from transformers import Blip2VisionConfig, Blip2VisionModel, LlamaConfig, LlamaForCausalLM

from cmoe_kernels import CMoEConfig, CMoEConnector

TASKS = ("vqa", "refer")
BOS, IMG, END_IMG, EOS = 1, 3, 4, 2


class MiniGPT4(nn.Module):
    def __init__(self, vision: Blip2VisionModel, language: LlamaForCausalLM) -> None:
        super().__init__()
        self.vision, self.language = vision.requires_grad_(False), language.requires_grad_(False)
        self.connector = CMoEConnector(
            CMoEConfig(
                in_features=vision.config.hidden_size,
                out_features=language.config.hidden_size,
                num_experts=3,
                tasks=TASKS,
                router_features=128,
            )
        )

    def forward(self, pixel_values: Tensor, tasks: list[str], prompt: Tensor, answer: Tensor) -> Tensor:
        """The loss on the answer. prompt and answer: [B, length] of token ids; prompt[:, :2] is <bos> <Img>."""
        with torch.no_grad():
            image = self.vision(pixel_values).last_hidden_state[:, 1:]  # without the class token
        image = self.connector(image, task=tasks).embeddings  # [B, patches / 4, width of the language model]
        embed = self.language.get_input_embeddings()
        inputs = torch.cat([embed(prompt[:, :2]), image, embed(prompt[:, 2:]), embed(answer)], dim=1)
        before = inputs.shape[1] - answer.shape[1]
        labels = torch.cat([answer.new_full((len(answer), before), -100), answer], dim=1)
        return self.language(inputs_embeds=inputs, labels=labels).loss


def build() -> MiniGPT4:
    vision = Blip2VisionModel(
        Blip2VisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    )
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,  # random weights of the usual size say much the same whatever stands in the prompt
        )
    )
    return MiniGPT4(vision, language)


def main(steps: int = 100) -> tuple[float, float]:
    """Overfit four images, two per task; returns the first and the last loss."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 3e-3)
    pixel_values = torch.randn(4, 3, 32, 32)
    tasks = ["vqa", "refer", "vqa", "refer"]
    prompt = torch.tensor([[BOS, IMG, END_IMG, 10, 11, 12]]).expand(4, -1)
    answer = torch.tensor([[20, 21, EOS], [30, 31, EOS], [22, 23, EOS], [32, 33, EOS]])
    losses = []
    for step in range(steps):
        loss = model(pixel_values, tasks, prompt, answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {losses[-1]:.3f}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters were trained")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
