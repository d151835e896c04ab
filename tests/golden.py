"""The golden request, word for word."""

from __future__ import annotations

GOLDEN_BODY = """{"prompt": "<lora:1795721:1.0> Surrounded by the natural beauty of a serene, \
wooded environment, the ohwx woman exudes a sense of tranquility and connection with her \
surroundings. She wears a flowing, organic-inspired dress in earthy tones, her face framed by \
loose, windblown hair. The lighting is soft and diffused, creating a soothing, meditative \
atmosphere that invites the viewer to pause and connect with the moment.",
 "num_images": 1, "super_resolution": true, "inpaint_faces": true, "w": 896, "h": 1152, \
"scheduler": "euler_a", "ar": "1:1"}"""
