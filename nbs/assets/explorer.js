// The results explorer. Everything on the page follows from `state` and `window.RUNS` (medpeft_study.explorer_data);
// a change calls `draw`, which draws all of it anew. No request leaves the page.
(() => {
  'use strict'
  const root = document.getElementById('explorer')
  if (!window.RUNS || !window.vegaEmbed) { root.textContent = 'The runs or the charting library are missing beside this page: build the site again.'; return }
  const { metrics, arms, titles, runs } = window.RUNS
  const metric = Object.fromEntries(metrics.map(m => [m.key, m]))
  const GROUPS = { study: 'Study', backbone: 'Backbone', dataset: 'Dataset', method: 'Method', seed: 'Seed' }
  const SHAPES = ['circle', 'square', 'diamond', 'triangle-up', 'cross', 'triangle-down', 'triangle-right', 'triangle-left']
  const USUAL = ['loss', 'reported_loss', 'text', 'letter', 'trainable', 'training_seconds', 'memory'] // columns of the table besides the axes

  // ---- state
  const settings = [...new Set(runs.map(r => r.setting))], size = setting => runs.filter(r => r.setting === setting).length
  const fresh = () => ({ setting: settings.reduce((a, b) => size(b) > size(a) ? b : a), x: 'reported_loss', y: 'loss', sort: '', up: true,
    ticked: Object.fromEntries(Object.keys(GROUPS).map(k => [k, new Set()])) })
  let state = fresh(), opener = null
  const passes = (run, except) => (!state.setting || run.setting === state.setting) &&
    Object.entries(state.ticked).every(([k, ticked]) => k === except || !ticked.size || ticked.has(String(run[k])))
  const value = (run, key) => key in metric ? run.metrics[key] : run[key]
  const shown = () => {
    const rows = runs.filter(r => passes(r)), { sort, up } = state
    if (!sort) return rows
    return rows.sort((a, b) => {
      const [p, q] = [value(a, sort), value(b, sort)]
      if (p === undefined || q === undefined) return (p === undefined) - (q === undefined) // what is missing comes last
      return (p < q ? -1 : p > q ? 1 : 0) * (up ? 1 : -1)
    })
  }

  // ---- words
  const h = (tag, attributes = {}, ...children) => { // data reaches the page as text, never as HTML
    const el = document.createElement(tag)
    for (const [k, v] of Object.entries(attributes)) k in el ? el[k] = v : el.setAttribute(k, v)
    el.append(...children)
    return el
  }
  const print = (key, v) => { // as d3 would, for the few formats that there are
    if (v === undefined || !(key in metric)) return v === undefined ? '–' : String(v)
    const [, digits, kind] = metric[key].format.match(/(\d*)([fd%])$/)
    return v.toLocaleString('en', { style: kind === '%' ? 'percent' : 'decimal', minimumFractionDigits: +digits, maximumFractionDigits: +digits })
  }
  const label = key => metric[key].label + (metric[key].unit ? ` (${metric[key].unit})` : '')
  const better = key => metric[key].better === 'low' ? 'lower is better' : 'higher is better'
  const name = run => `${run.arm}, seed ${run.seed}`
  const word = (key, v) => titles[key]?.[v] ?? (v === '' ? 'none' : String(v))

  // ---- light or dark: Quarto and smalldocs say it by a class, Bootstrap by an attribute, and otherwise the background tells
  const isDark = () => {
    for (const el of [document.documentElement, document.body]) {
      if (el.dataset.bsTheme) return el.dataset.bsTheme === 'dark'
      if (el.classList.contains('quarto-dark')) return true
      if (el.classList.contains('quarto-light')) return false
    }
    const [r, g, b, a = 1] = (getComputedStyle(document.body).backgroundColor.match(/[\d.]+/g) || [255, 255, 255]).map(Number)
    return a > 0 && .299 * r + .587 * g + .114 * b < 128
  }
  let dark = isDark()

  // ---- charts
  const ink = () => dark ? { text: '#dee2e6', soft: '#adb5bd', grid: '#495057', paper: '#212529' } : { text: '#212529', soft: '#495057', grid: '#dee2e6', paper: '#ffffff' }
  const embed = (el, spec, sentence, ready = () => {}) => { // one after the other, so that the last call wins
    const { text, soft, grid } = ink(), font = getComputedStyle(root).fontFamily
    const config = { mark: { aria: false }, background: null, font, view: { stroke: null }, title: { color: text },
      axis: { labelColor: soft, titleColor: text, gridColor: grid, domainColor: soft, tickColor: soft, titleFontWeight: 'normal', labelFontSize: 12, titleFontSize: 13, titlePadding: 10 },
      legend: { labelColor: text, titleColor: text, labelFontSize: 13, labelLimit: 320 } }
    el.drawn = (el.drawn || Promise.resolve()).then(async () => {
      if (!el.isConnected) return
      el.result?.finalize()
      el.result = await window.vegaEmbed(el, { width: 'container', autosize: { type: 'fit', contains: 'padding' }, config, ...spec },
        { mode: 'vega-lite', renderer: 'svg', actions: false, tooltip: { theme: dark ? 'dark' : 'light' } })
      for (const [k, v] of Object.entries({ role: 'img', 'aria-label': sentence })) el.setAttribute(k, v) // in place of Vega's own
      el.querySelector('svg').setAttribute('aria-hidden', 'true')
      ready(el.result.view)
    })
  }
  // On the front: no run of the same setting is as good on both axes and better on one
  const front = points => {
    const cost = (p, k) => metric[state[k]].better === 'low' ? p[k] : -p[k]
    const beats = (q, p) => q.setting === p.setting && ['x', 'y'].every(k => cost(q, k) <= cost(p, k)) && ['x', 'y'].some(k => cost(q, k) < cost(p, k))
    return points.filter(p => !points.some(q => beats(q, p)))
  }
  const span = values => {
    const [low, high] = [Math.min(...values), Math.max(...values)], pad = (high - low || Math.abs(high) || 1) * .08
    return [low - pad, high + pad]
  }
  const plot = h('div', { class: 'plot' }), note = h('p', { class: 'note' })
  const drawPlot = rows => {
    const { x, y } = state
    const all = rows.map(r => ({ id: r.run_id, run: name(r), arm: r.arm, setting: r.setting, x: r.metrics[x], y: r.metrics[y] }))
    const points = all.filter(p => p.x !== undefined && p.y !== undefined), best = front(points)
    const ids = new Set(best.map(p => p.id)), { text, soft, paper } = ink()
    points.forEach(p => { p.best = ids.has(p.id) })
    Object.assign(plot.dataset, { points: points.length, front: [...ids].join(' ') })
    const same = x !== y && metric[x].unit === metric[y].unit && metric[x].format === metric[y].format
    note.textContent = !points.length ? 'No run has a value on both axes.' : 'Ringed, and joined by the dashed line: the Pareto front. No run of the same setting is as good on both axes and better on one.' +
      (same ? ' Dotted: where both axes are equal.' : '')
    plot.hidden = !points.length
    if (!points.length) return
    const scale = { x: span(points.map(p => p.x)), y: span(points.map(p => p.y)) }, ends = [Math.min(scale.x[0], scale.y[0]), Math.max(scale.x[1], scale.y[1])]
    const place = k => ({ field: k, type: 'quantitative', title: [metric[state[k]].label, [metric[state[k]].unit, better(state[k])].filter(Boolean).join(', ')], scale: { domain: scale[k], zero: false, nice: false },
      axis: { format: metric[state[k]].format.replace(',d', '.3~s').replace(/([f%])$/, '~$1'), tickCount: 6, labelOverlap: 'greedy', titleLimit: 0 } })
    const xy = { x: place('x'), y: place('y') }, domain = arms.map(a => a.name)
    const arm = (range, legend) => ({ field: 'arm', type: 'nominal', scale: { domain, range }, legend })
    const legend = { title: null, orient: 'bottom', columns: plot.clientWidth < 600 ? 1 : 3, symbolSize: 110, values: domain.filter(a => points.some(p => p.arm === a)) }
    const tip = k => ({ field: k, title: metric[state[k]].label, format: metric[state[k]].format })
    const layer = [
      { data: { values: same ? ends.map(v => ({ x: v, y: v })) : [] }, mark: { type: 'line', clip: true, color: soft, strokeDash: [2, 4] }, encoding: xy },
      { data: { values: best }, mark: { type: 'line', color: text, strokeDash: [7, 4], interpolate: metric[x].better === 'low' ? 'step-after' : 'step-before' },
        encoding: { ...xy, detail: { field: 'setting' } } },
      { name: 'runs', mark: { type: 'point', filled: true, size: 140, opacity: 1, cursor: 'pointer' }, encoding: { ...xy,
        color: arm(arms.map(a => a.color), legend), shape: arm(domain.map((_, i) => SHAPES[i % SHAPES.length]), legend),
        stroke: { condition: { test: 'datum.best', value: text }, value: paper }, strokeWidth: { condition: { test: 'datum.best', value: 2 }, value: 1 },
        tooltip: [{ field: 'run' }, { field: 'setting' }, tip('x'), tip('y')] } },
      { transform: [{ filter: 'datum.id === opened' }], mark: { type: 'point', size: 520, stroke: text, strokeWidth: 2, filled: false }, encoding: xy }]
    embed(plot, { height: 380, params: [{ name: 'opened', value: current() }], data: { values: points }, layer },
      `Scatter plot of ${points.length} runs: ${label(y)}, ${better(y)}, against ${label(x)}, ${better(x)}. On the Pareto front: ${best.map(p => p.run).join('; ')}. The table below holds the same runs.`,
      view => view.addEventListener('click', (_, item) => item?.datum?.id && open(item.datum.id)))
  }

  // ---- table and download
  const table = h('table', { class: 'runs' })
  const drawTable = rows => {
    const columns = [...(state.setting ? [] : ['setting']), ...new Set([state.x, state.y, ...USUAL.filter(k => k in metric)])]
    const head = (key, text) => {
      const on = state.sort === key, sort = on ? (state.up ? 'ascending' : 'descending') : 'none'
      const button = h('button', { type: 'button', onclick: () => { state.up = on ? !state.up : true; state.sort = key; draw(); table.querySelector(`[data-sort="${key}"]`).focus() } },
        text, h('span', { 'aria-hidden': 'true' }, on ? (state.up ? ' ▲' : ' ▼') : ''))
      button.dataset.sort = key
      return h('th', { scope: 'col', 'aria-sort': sort }, button)
    }
    const row = r => {
      const button = h('button', { type: 'button', onclick: () => open(r.run_id) }, r.arm)
      button.dataset.run = r.run_id
      if (r.run_id === current()) button.setAttribute('aria-current', 'true')
      return h('tr', {}, h('th', { scope: 'row' }, button), h('td', {}, String(r.seed)), ...columns.map(k => h('td', { class: k in metric ? 'number' : '' }, print(k, value(r, k)))))
    }
    table.replaceChildren(
      h('thead', {}, h('tr', {}, head('arm', 'Run'), head('seed', 'Seed'), ...columns.map(k => head(k, k in metric ? label(k) : 'Setting')))),
      h('tbody', {}, ...rows.map(row)))
  }
  const download = () => {
    const who = ['run_id', 'study', 'setting', 'arm', 'method', 'backbone', 'dataset', 'prompt', 'seed', 'lr'], columns = [...who, ...metrics.map(m => m.key)]
    const quote = v => /[",\n]/.test(v) ? `"${v.replaceAll('"', '""')}"` : v
    const lines = [columns, ...shown().map(r => columns.map(k => value(r, k) ?? ''))].map(row => row.map(v => quote(String(v))).join(','))
    const url = URL.createObjectURL(new Blob([lines.join('\n') + '\n'], { type: 'text/csv' }))
    h('a', { href: url, download: 'medpeft-runs.csv' }).click()
    setTimeout(() => URL.revokeObjectURL(url), 1000)
  }

  // ---- details of a run; its address is #run=...
  const details = h('section', { class: 'details', hidden: true, 'aria-labelledby': 'explorer-run' })
  const current = () => decodeURIComponent(location.hash.match(/^#run=(.+)$/)?.[1] ?? '')
  const open = id => { opener = document.activeElement; history.replaceState(null, '', `#run=${encodeURIComponent(id)}`); draw(); drawDetails(true) }
  const close = () => {
    history.replaceState(null, '', location.pathname + location.search)
    draw(); drawDetails()
    const back = opener?.dataset?.run && table.querySelector(`[data-run="${opener.dataset.run}"]`)
    ;(back || table.querySelector('tbody button'))?.focus()
  }
  const pairs = (config, keys) => h('dl', {}, ...keys.map(k => h('div', {}, h('dt', {}, k), h('dd', {}, String(config[k] ?? 'none')))))
  const drawDetails = focus => {
    const id = current(), run = runs.find(r => r.run_id === id)
    details.hidden = !id
    if (!id) return details.replaceChildren()
    const heading = h('h2', { id: 'explorer-run', tabIndex: -1 }, run ? name(run) : 'No such run')
    const top = h('header', {}, heading, h('button', { type: 'button', class: 'close', onclick: close }, 'Close'))
    if (!run) details.replaceChildren(top, h('p', {}, `There is no finished run ${id} in these records.`))
    else {
      const charts = Object.keys(run.curve).filter(k => k !== 'step').map(k => [k, h('div', { class: 'curve' })]), map = h('div', { class: 'map' })
      const all = h('details', {}, h('summary', {}, `All ${Object.keys(run.config).length} fields of the config`), pairs(run.config, Object.keys(run.config)))
      details.replaceChildren(top, h('p', { class: 'setting' }, run.setting),
        h('dl', { class: 'scores' }, ...metrics.filter(m => m.key in run.metrics).map(m => h('div', {}, h('dt', {}, label(m.key)), h('dd', {}, print(m.key, run.metrics[m.key]))))),
        h('h3', {}, 'Curves'), h('div', { class: 'curves' }, ...charts.map(([, el]) => el)),
        ...(run.ranks.layers.length ? [h('h3', {}, 'Rank of every adapted matrix'), map] : []),
        h('h3', {}, 'Config: the subject, and what differs from the paper'), pairs(run.config, run.said), all,
        h('h3', {}, 'To repeat it'), h('pre', { tabIndex: 0 }, h('code', {}, run.command)),
        h('p', {}, 'A finished run is repeated only with ', h('code', {}, '-p force True'), '. The record: ', h('a', { href: `assets/records/${id}.json` }, `reports/records/${id}.json`), '.'))
      charts.forEach(([k, el]) => drawCurve(el, run, k))
      if (run.ranks.layers.length) drawMap(map, run)
    }
    if (focus) { heading.focus({ preventScroll: true }); details.scrollIntoView({ block: 'start' }) }
  }
  const CURVES = { task_loss: 'task loss (nats a token)', penalty: 'penalty, unweighted', total_rank: 'total rank' }
  const drawCurve = (el, run, key) => {
    const values = run.curve.step.map((step, i) => ({ step, v: run.curve[key][i] })), color = arms.find(a => a.name === run.arm).color
    embed(el, { height: 170, data: { values }, title: { text: CURVES[key], anchor: 'start', fontWeight: 'normal', fontSize: 13 },
      mark: { type: 'line', color, point: values.length < 60 && { color, size: 20 }, tooltip: true },
      encoding: { x: { field: 'step', type: 'quantitative', title: 'optimizer step', scale: { nice: false }, axis: { format: 'd', tickMinStep: 1, tickCount: 5, grid: false } },
        y: { field: 'v', type: 'quantitative', title: null, scale: { zero: true }, axis: { tickCount: 5, format: key === 'total_rank' ? ',d' : '~g' } } } },
      `${CURVES[key]} by optimizer step: from ${values[0].v} to ${values.at(-1).v}.`)
  }
  const drawMap = (el, run) => {
    const { layers, projections, ranks } = run.ranks, values = projections.flatMap((projection, i) => layers.map((layer, j) => ({ projection, layer, rank: ranks[i][j] }))).filter(v => v.rank !== null)
    const mean = values.reduce((sum, v) => sum + v.rank, 0) / values.length, at = (field, title) => ({ field, type: 'ordinal', title, sort: null, axis: { labelOverlap: 'greedy', labelSeparation: 6, labelAngle: 0, ticks: false, domain: false } })
    embed(el, { height: 26 * projections.length + 90, data: { values }, mark: { type: 'rect', stroke: ink().paper, strokeWidth: .5 },
      encoding: { x: at('layer', 'layer'), y: at('projection', null), tooltip: ['projection', 'layer', 'rank'].map(field => ({ field })),
        color: { field: 'rank', type: 'quantitative', scale: { scheme: 'viridis', domain: [0, run.config.rank] }, legend: { title: 'rank', orient: 'bottom', gradientLength: 180, titleOrient: 'left' } } } },
      `Heat map of the final rank by layer and projection: mean ${mean.toFixed(1)}, from ${Math.min(...values.map(v => v.rank))} to ${Math.max(...values.map(v => v.rank))}, at first ${run.config.rank}.`)
  }

  // ---- controls
  const select = (key, text, options) => h('label', { class: 'choice' }, text, h('select', { name: key, onchange: e => { state[key] = e.target.value; forget(); draw() } },
    ...options.map(([v, t]) => h('option', { value: v }, t))))
  const group = ([key, text]) => h('fieldset', {}, h('legend', {}, text), ...[...new Set(runs.map(r => r[key]))].sort((a, b) => key === 'seed' ? a - b : 0).map(v =>
    h('label', {}, h('input', { type: 'checkbox', name: key, value: String(v), onchange: e => { state.ticked[key][e.target.checked ? 'add' : 'delete'](e.target.value); draw() } }), word(key, v), h('span', { class: 'count' }))))
  const live = h('p', { class: 'live', role: 'status', 'aria-live': 'polite' })
  const named = metrics.map(m => [m.key, label(m.key)])
  const controls = h('form', { class: 'controls', 'aria-label': 'Choose runs and axes', onsubmit: e => e.preventDefault() },
    select('setting', 'Setting', [...settings.map(s => [s, `${s} (${size(s)})`]), ['', `All settings (${runs.length})`]]),
    h('div', { class: 'groups' }, ...Object.entries(GROUPS).map(group)), h('p', { class: 'note' }, 'Tick to narrow; nothing ticked in a group means all of it.'),
    h('div', { class: 'axes' }, select('x', 'Across (x)', named), select('y', 'Up (y)', named)),
    h('div', { class: 'actions' }, live, h('button', { type: 'button', onclick: () => { state = fresh(); draw() } }, 'Reset'), h('button', { type: 'button', onclick: download }, 'Download CSV')))
  const has = (key, v) => runs.some(r => (!state.setting || r.setting === state.setting) && String(r[key]) === v)
  const forget = () => { for (const [key, ticked] of Object.entries(state.ticked)) for (const v of ticked) if (!has(key, v)) ticked.delete(v) }
  const drawControls = rows => {
    for (const el of controls.querySelectorAll('select')) el.value = state[el.name]
    for (const el of controls.querySelectorAll('input')) { // the count: how many runs ticking it leads to
      const n = runs.filter(r => passes(r, el.name) && String(r[el.name]) === el.value).length
      el.parentElement.hidden = !has(el.name, el.value)
      el.checked = state.ticked[el.name].has(el.value)
      el.disabled = !n && !el.checked
      el.parentElement.querySelector('.count').textContent = n
    }
    const without = rows.filter(r => [state.x, state.y].some(k => r.metrics[k] === undefined)).length
    live.textContent = `${rows.length} of ${runs.length} runs shown` + (without ? `, ${without} without a value on these axes` : '')
  }

  const draw = () => { const rows = shown(); root.style.colorScheme = dark ? 'dark' : 'light'; drawControls(rows); drawPlot(rows); drawTable(rows) }
  root.replaceChildren(controls, plot, note, details, h('p', { class: 'note' }, 'The runs shown: a name opens the run, a heading sorts.'), h('div', { class: 'scroll', role: 'region', tabIndex: 0, 'aria-label': 'Table of the runs shown' }, table))
  draw(); drawDetails(!!current())
  window.addEventListener('hashchange', () => { draw(); drawDetails(true) })
  const repaint = () => { if (dark !== isDark()) { dark = !dark; draw(); drawDetails() } }
  for (const el of [document.documentElement, document.body]) new MutationObserver(repaint).observe(el, { attributes: true, attributeFilter: ['class', 'data-bs-theme', 'data-scheme', 'style'] })
  window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => setTimeout(repaint, 100))
})()
