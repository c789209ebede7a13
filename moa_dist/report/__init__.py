"""Reports on a run, or several compared, as one offline HTML page: at most 1.5 MB for a run.

Why our own SVG: plotly.js is 4.8 MB, Bokeh 1.3 MB before data, and neither they nor Vega show
anything without scripts.
"""
