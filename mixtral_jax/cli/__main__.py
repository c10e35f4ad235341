"""`python -m mixtral_jax.cli`: the command `mixtral-jax`."""

from mixtral_jax.cli.main import main

if __name__ == "__main__":
    main()
