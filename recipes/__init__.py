"""Ground floor: recipes, the reader that checks them, model directories and lineage, the embedded lab."""

if (
    __name__ != "trueup.recipes"
):  # from the repository's root `import recipes` would make a second copy of everything
    raise ImportError("import trueup.recipes, not recipes: the folders at the root are packages of trueup")
