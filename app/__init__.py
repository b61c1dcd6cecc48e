"""The trueup command, the runner, and everything a person opens."""

if __name__ != "trueup.app":  # from the repository's root `import app` would make a second copy of everything
    raise ImportError("import trueup.app, not app: the folders at the root are packages of trueup")
