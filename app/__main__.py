"""`python -m trueup.app` is `trueup`: the form that torchrun and accelerate launch need."""

from trueup.app.cli import main

if __name__ == "__main__":
    main()
