"""Operations on paged keys and values: one folder per operation, one meaning, several forms.

``<op>/reference.py`` is slow and obviously right; ``<op>/torch_path.py`` is fast on any device that torch
runs on; ``<op>/__init__.py`` chooses. There are no gradients: call under ``torch.no_grad()``.
Importing this package changes nothing.
"""
