"""The trueup command, the runner, and everything a person opens."""

if __name__ != "trueup.app":  # `import app` from the repository's root would be a second copy
    raise ImportError("import trueup.app, not app: the root's folders are packages of trueup")
