"""The GPT, its tokenizer and chat template, data formats, pretraining, generation."""

if __name__ != "trueup.base":  # from the repository's root `import base` would make a second copy of everything
    raise ImportError("import trueup.base, not base: the folders at the root are packages of trueup")
