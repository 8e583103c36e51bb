"""The masked autoencoder and its parts. `fcmae.py` is the one to read first."""
