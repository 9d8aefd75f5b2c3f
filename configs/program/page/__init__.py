"""Pages that open anywhere: one HTML file without a network, a script or a file beside it.

    page.py        a template and its values → the page
    charts.py      numbers → SVG that follows the page's colours
    page.html.j2   what all pages share: colours for light and dark, tables, cards, tiles

Imports nothing of ours outside itself.
"""
