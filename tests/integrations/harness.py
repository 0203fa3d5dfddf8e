"""What the tests of lm-evaluation-harness share: a small model on bytes that was never trained, and requests."""

import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastdiff import conditional_nll
from fastdiff.integrations.lm_eval import Bytes, FastdiffLM
from fastdiff.model import DiffusionTransformer, ModelConfig

M, L = 256, 24


def thin(num_states=M + 1, sigma_conditioned=False):
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(num_states, L, 16, 1, 2, 8 * sigma_conditioned))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def harness(model=None, **options):
    model = thin() if model is None else model
    return FastdiffLM(model, Bytes(), **(dict(mask_index=M, exclude_mask=True, num_samples=20, device="cpu") | options))


def requests(kind, *arguments, doc_ids=None):
    ids = range(len(arguments)) if doc_ids is None else doc_ids
    return [
        Instance(kind, {}, args, k, ("task", doc, 1)) for k, (args, doc) in enumerate(zip(arguments, ids, strict=True))
    ]


WORDS = ("[UNK]", "[CLS]", "[SEP]", "[MASK]", "sky", "grass", "is", "blue", "green", "never", "(", ")", "()")
IDS = {word: k for k, word in enumerate(WORDS)}


def words(template="$A"):
    """A tokenizer of words that adds what the template says."""
    tokenizer = Tokenizer(models.WordLevel(IDS, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, IDS[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    names = dict(bos_token="[CLS]", eos_token="[SEP]", mask_token="[MASK]", unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tokens(text):
    return torch.tensor([IDS[word] for word in text.split()], dtype=torch.int64)


def direct(model, context, target, name=0, **options):
    """The nll of conditional_nll, as the harness is to name it."""
    options = dict(mask_index=IDS["[MASK]"], num_samples=20, exclude_mask=False) | options
    return conditional_nll(model, [context], [target], sample_ids=torch.tensor([name]), **options).nll.item()
