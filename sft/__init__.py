"""Supervised fine-tuning through TRL."""

if __name__ != "trueup.sft":  # `import sft` from the repository's root would be a second copy
    raise ImportError("import trueup.sft, not sft: the root's folders are packages of trueup")
