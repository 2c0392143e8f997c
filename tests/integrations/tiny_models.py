"""Random models of a few thousand weights, of every family of projectors, and texts with images for them."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

IMAGE, VIDEO, VOCAB, WIDTH = 60, 61, 64, 32


@dataclass
class Images:
    """What a processor makes of the images of a batch: arguments of forward, and how many tokens of the text each image becomes."""

    arguments: dict[str, Any]
    tokens: list[int]


def text(kind=tf.LlamaConfig, **settings):
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    return kind(**{"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "max_position_embeddings": 128, **small, **settings})


def vision(kind, **settings):
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return kind(**{**small, **settings})


def square(side, tokens):
    """Images of one size that all become as many tokens."""

    def images(model, per_sample):
        count = sum(per_sample)
        return Images({"pixel_values": torch.randn(count, 3, side, side)}, [tokens] * count)

    return images


def tiled(model, per_sample):
    """Images of different sizes, cut into tiles of 8 x 8; LLaVA-OneVision cuts those alone that are the only one of their sample."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    count, one_vision = sum(per_sample), model.config.model_type.endswith("onevision")
    sizes = torch.tensor([(8, 16), (16, 12), (16, 8)] * count)[:count]
    alone = [not one_vision or n == 1 for n in per_sample for _ in range(n)]
    tiles = [
        image_size_to_num_patches(size, model.config.image_grid_pinpoints, 8) if cut else 1 for size, cut in zip(sizes, alone, strict=True)
    ]
    strategy = {} if one_vision else {"vision_feature_select_strategy": "default"}
    blank = [torch.zeros(n, 4, WIDTH) for n in tiles]
    _, tokens = model.model.pack_image_features(blank, sizes, image_newline=torch.zeros(WIDTH), **strategy)
    pixels = torch.randn(count, max(tiles), 3, 8, 8)
    numbers = {"batch_num_images": torch.tensor(per_sample)} if one_vision else {}
    return Images({"pixel_values": pixels, "image_sizes": sizes, **numbers}, tokens.tolist())


def pixtral(merge):
    """Images of different sizes, whose patches lie packed behind one another."""

    def images(model, per_sample):
        count = sum(per_sample)
        sizes = torch.tensor([(8, 16), (16, 16), (16, 8)] * count)[:count]
        pixels = torch.randn(count, 3, 16, 16)
        return Images({"pixel_values": pixels, "image_sizes": sizes}, [int(h // (4 * merge) * (w // (4 * merge))) for h, w in sizes])

    return images


def qwen(model, per_sample):
    """Patches of 2 x 2 pixels of all images in one matrix; 2 x 2 patches become a token."""
    count = sum(per_sample)
    grid = torch.tensor([(1, 4, 4), (1, 2, 6), (1, 4, 2)] * count)[:count]
    patches = int(grid.prod(-1).sum())
    return Images({"pixel_values": torch.randn(patches, 3 * 2 * 2), "image_grid_thw": grid}, (grid.prod(-1) // 4).tolist())


def llava():
    config = tf.LlavaConfig(vision_config=vision(tf.CLIPVisionConfig), text_config=text(), image_token_index=IMAGE)
    return tf.LlavaForConditionalGeneration(config), square(8, 4)


def llava_pixtral():
    tower = vision(tf.PixtralVisionConfig, image_size=16)
    config = tf.LlavaConfig(
        vision_config=tower,
        text_config=text(tf.MistralConfig),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return tf.LlavaForConditionalGeneration(config), pixtral(1)


def llava_next():
    pinpoints = [[8, 16], [16, 8], [16, 16]]
    config = tf.LlavaNextConfig(
        vision_config=vision(tf.CLIPVisionConfig), text_config=text(), image_token_index=IMAGE, image_grid_pinpoints=pinpoints
    )
    return tf.LlavaNextForConditionalGeneration(config), tiled


def llava_onevision():
    config = tf.LlavaOnevisionConfig(
        vision_config=vision(tf.SiglipVisionConfig, vision_use_head=False),
        text_config=text(tf.Qwen2Config),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        vision_feature_layer=-1,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), tiled


def vipllava():
    config = tf.VipLlavaConfig(
        vision_config=vision(tf.CLIPVisionConfig), text_config=text(), image_token_index=IMAGE, vision_feature_layer=[-1, -2]
    )
    return tf.VipLlavaForConditionalGeneration(config), square(8, 4)


def paligemma():
    tower = vision(tf.SiglipVisionConfig, vision_use_head=False, projection_dim=WIDTH)
    config = tf.PaliGemmaConfig(vision_config=tower, text_config=text(tf.GemmaConfig), image_token_index=IMAGE, projection_dim=WIDTH)
    return tf.PaliGemmaForConditionalGeneration(config), square(8, 4)


def gemma3():
    tower = vision(tf.SiglipVisionConfig, vision_use_head=False, image_size=16)
    words = text(tf.Gemma3TextConfig, sliding_window=64)
    config = tf.Gemma3Config(
        vision_config=tower, text_config=words, image_token_index=IMAGE, mm_tokens_per_image=4, boi_token_index=58, eoi_token_index=59
    )
    return tf.Gemma3ForConditionalGeneration(config), square(16, 4)


def internvl():
    config = tf.InternVLConfig(
        vision_config=vision(tf.InternVLVisionConfig, image_size=[8, 8], patch_size=[2, 2]),
        text_config=text(tf.Qwen2Config),
        image_token_id=IMAGE,
    )
    return tf.InternVLForConditionalGeneration(config), square(8, 4)


def mistral3():
    config = tf.Mistral3Config(
        vision_config=vision(tf.PixtralVisionConfig, image_size=16),
        text_config=text(tf.MistralConfig),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return tf.Mistral3ForConditionalGeneration(config), pixtral(2)


def _qwen_text(kind, **settings):
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, **settings.pop("rope", {})}
    return {k: v for k, v in text(kind, **settings).to_dict().items() if k not in ("model_type", "rope_parameters")} | {
        "rope_parameters": rope
    }


def _qwen(name, vision_config, kind, **settings):
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 58, "vision_end_token_id": 59}
    config = getattr(tf, f"{name}Config")(
        vision_config={"patch_size": 2, "temporal_patch_size": 1, "spatial_merge_size": 2, "depth": 2, "num_heads": 2, **vision_config},
        text_config=_qwen_text(kind, **settings),
        **ids,
    )
    return getattr(tf, f"{name}ForConditionalGeneration")(config), qwen


def qwen2_vl():
    return _qwen("Qwen2VL", {"embed_dim": 16, "hidden_size": WIDTH}, tf.Qwen2VLTextConfig)


def qwen2_5_vl():
    tower = {"hidden_size": 16, "out_hidden_size": WIDTH, "intermediate_size": 24, "fullatt_block_indexes": [1], "window_size": 8}
    return _qwen("Qwen2_5_VL", tower, tf.Qwen2_5_VLTextConfig)


_QWEN3 = {
    "hidden_size": 16,
    "out_hidden_size": WIDTH,
    "intermediate_size": 24,
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 16,
}


def qwen3_vl():
    return _qwen("Qwen3VL", _QWEN3, tf.Qwen3VLTextConfig, rope={"mrope_interleaved": True})


def qwen3_vl_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return _qwen("Qwen3VLMoe", _QWEN3, tf.Qwen3VLMoeTextConfig, rope={"mrope_interleaved": True}, **experts)


def _idefics(name):
    tower = vision(getattr(tf, f"{name}VisionConfig"), image_size=16)
    config = getattr(tf, f"{name}Config")(vision_config=tower, text_config=text(), image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
    return getattr(tf, f"{name}ForConditionalGeneration")(config), square(16, 4)


def idefics3():
    return _idefics("Idefics3")


def smolvlm():
    return _idefics("SmolVLM")


def blip_2():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    words = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        word_embed_proj_dim=WIDTH,
        pad_token_id=0,
    )
    config = tf.Blip2Config(
        vision_config=tf.Blip2VisionConfig(**small, image_size=8, patch_size=4, initializer_range=0.2),
        qformer_config=tf.Blip2QFormerConfig(**small, encoder_hidden_size=16, vocab_size=VOCAB),
        text_config=words,
        num_query_tokens=3,
        image_token_index=IMAGE,
    )
    return tf.Blip2ForConditionalGeneration(config), square(8, 3)


FAMILIES = {
    f.__name__: f
    for f in (
        llava,
        llava_pixtral,
        llava_next,
        llava_onevision,
        vipllava,
        paligemma,
        gemma3,
        internvl,
        mistral3,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_vl_moe,
        idefics3,
        smolvlm,
        blip_2,
    )
}


def build(family, seed=0):
    """A model in eval mode, with spread-out weights, and the images for it."""
    torch.manual_seed(seed)
    model, images = FAMILIES[family]()
    with torch.no_grad():  # so far apart that every image token matters to every logit
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=(weight.numel() / len(weight)) ** -0.5)
    return model.eval(), images


def batch(model, images, per_sample=(1, 2), seed=1, labels=False):
    """Texts of different lengths, padded on the left, each with its number of images."""
    torch.manual_seed(seed)
    made = images(model, per_sample)
    texts, left = [], list(made.tokens)
    for n, count in enumerate(per_sample):
        words = [1, *torch.randint(2, 50, (2 + n,)).tolist()]
        for _ in range(count):
            words += [IMAGE] * left.pop(0) + torch.randint(2, 50, (2,)).tolist()
        texts.append(words)
    return texts_with_images(model, texts, made.arguments, per_sample, labels)


def texts_with_images(model, texts, arguments, per_sample, labels):
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts])
    out = {"input_ids": ids, "attention_mask": mask, **arguments}
    kind = model.config.model_type.removeprefix("cmoe_")
    if kind.startswith("qwen"):
        out["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    if kind in ("paligemma", "gemma3"):
        out["token_type_ids"] = (ids == IMAGE).long() if kind == "gemma3" else torch.zeros_like(ids)
    if kind in ("idefics3", "smolvlm"):  # [samples, most images of a sample, ...], zeros where a sample has fewer
        pixels = out["pixel_values"].split(list(per_sample))
        out["pixel_values"] = torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)
    if labels:
        out["labels"] = ids.masked_fill((mask == 0) | (ids == IMAGE), -100)
    return out


def single(model, images, batch, row):
    """One sample of a batch in which each sample has one image, without its padding."""
    ids = batch["input_ids"][row, batch["attention_mask"][row].bool()].tolist()
    arguments = {
        name: batch[name][row : row + 1] for name in ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw") if name in batch
    }
    if "image_grid_thw" in batch:
        arguments["pixel_values"] = batch["pixel_values"].split(batch["image_grid_thw"].prod(-1).tolist())[row]
    if model.config.model_type.removeprefix("cmoe_") in ("idefics3", "smolvlm"):
        arguments["pixel_values"] = arguments["pixel_values"][0]
    return texts_with_images(model, [ids], arguments, [1], labels=False)


def videos(model, images):
    """Two samples: an image and a video of two frames in the first, a video in the second."""
    torch.manual_seed(2)
    made = images(model, [1])
    if model.config.model_type.endswith("onevision"):
        made.arguments["pixel_values_videos"] = torch.randn(2, 2, 3, 8, 8)
        frames = [[VIDEO] * 3]  # two frames pooled to a token each, and a newline
    else:
        made.arguments["video_grid_thw"] = torch.tensor([(2, 2, 4)] * 2)
        made.arguments["pixel_values_videos"] = torch.randn(2 * 2 * 2 * 4, 3 * 2 * 2)
        frames = [[VIDEO] * 2, [VIDEO] * 2] if "qwen3" in model.config.model_type else [[VIDEO] * 4]
    video = [token for frame in frames for token in (7, *frame)]
    texts = [[1, 5, *[IMAGE] * made.tokens[0], 9, *video, 4], [1, 8, *video, 6, 3]]
    return texts_with_images(model, texts, made.arguments, (1, 0), labels=False)


class OwnConfig(tf.PreTrainedConfig):
    model_type = "own"
    image_token_id: int = IMAGE


@dataclass
class OwnOutput(tf.utils.ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class OwnForConditionalGeneration(tf.PreTrainedModel, tf.GenerationMixin):
    """A user's model: any features, a bridge, one matrix for a language model."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.bridge = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.SiLU(), torch.nn.Linear(24, WIDTH))
        self.words = torch.nn.Embedding(VOCAB, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCAB)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, pixel_values=None, labels=None, **kwargs):
        where = (input_ids == self.config.image_token_id)[..., None]
        embeddings = self.words(input_ids).masked_scatter(where, self.bridge(pixel_values))
        return OwnOutput(logits=self.head(embeddings))


def own_model():
    torch.manual_seed(0)
    ids = torch.tensor([[1, IMAGE, IMAGE, 4], [IMAGE, IMAGE, IMAGE, IMAGE]])
    return OwnForConditionalGeneration(OwnConfig()), {"input_ids": ids, "pixel_values": torch.randn(3, 2, 12)}
