"""Trains a Vision Transformer within a budget: python train_imagenet.py --config-file rcfg/ours.yaml

Any option may be overridden, for example --data.loader=torchvision; --help lists them. The same command continues a
run that was stopped.
"""

from vitlocal.launch import train

if __name__ == "__main__":
    train()
