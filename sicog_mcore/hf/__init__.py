"""Registers the exported model with transformers, so that this package runs it and not code in the exported folder.

``import sicog_mcore.hf`` makes the Auto classes of transformers know it, without ``trust_remote_code``.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from .configuration_sicog import SicogConfig
from .image_processing_sicog import SicogImageProcessor
from .modeling_sicog import SicogForConditionalGeneration
from .processing_sicog import SicogProcessor

__all__ = ["SicogConfig", "SicogForConditionalGeneration", "SicogImageProcessor", "SicogProcessor"]

AutoConfig.register(SicogConfig.model_type, SicogConfig)
AutoModelForImageTextToText.register(SicogConfig, SicogForConditionalGeneration)
AutoImageProcessor.register(SicogConfig, image_processor_classes={"pil": SicogImageProcessor})
AutoProcessor.register(SicogConfig, SicogProcessor)
