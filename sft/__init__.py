"""Supervised fine-tuning through TRL."""

if __name__ != "trueup.sft":  # from the repository's root `import sft` would make a second copy of everything
    raise ImportError("import trueup.sft, not sft: the folders at the root are packages of trueup")
