"""How to cite the method."""

CITATION = """\
@inproceedings{loedeman2024prompt,
  title     = {Prompt Generation Networks for Input-Space Adaptation of Frozen Vision Transformers},
  author    = {Loedeman, Jochem and Stol, Maarten and Han, Tengda and Asano, Yuki M.},
  booktitle = {British Machine Vision Conference},
  year      = {2024}
}"""
