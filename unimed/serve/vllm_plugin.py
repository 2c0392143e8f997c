"""Uni-Med in vLLM: `vllm serve runs/NAME/model`. vLLM finds `register` by the entry point vllm.general_plugins (docs/unimed/serve.md)."""

ARCHITECTURE = "UniMedForConditionalGeneration"


def register() -> None:
    """Tells vLLM of the model. It may be called several times, in each of vLLM's processes."""
    from vllm import ModelRegistry

    import unimed.models.unimed  # noqa: F401  (its configuration and processor become known to the Auto classes)

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"unimed.serve.vllm_model:{ARCHITECTURE}")
