"""How colours look: their contrast (WCAG 2), and their distance (CIELAB) to those who see fewer of them.

Simulations are those of Machado, Oliveira and Fernandes (2009) at full severity, on linear RGB.
"""

import numpy as np

VISIONS = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = np.array([0.95047, 1.0, 1.08883])


def linear(colour):
    """Of a hexadecimal colour: red, green and blue, 0 to 1."""
    x = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """1 to 21."""
    light, dark = sorted(((_TO_XYZ @ linear(colour))[1] + 0.05 for colour in (one, other)), reverse=True)
    return light / dark


def distance(one, other, vision):
    """In CIELAB, where about 2 can just be noticed side by side."""
    return float(np.linalg.norm(_lab(one, vision) - _lab(other, vision)))


def _lab(colour, vision):
    x = _TO_XYZ @ np.clip(VISIONS[vision] @ linear(colour), 0, 1) / _WHITE
    x, y, z = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
