// Charts of memory over time, as SVG: a small one for the node, and one with axes for the dialog.

const SVG = "http://www.w3.org/2000/svg";
const MIB = 2 ** 20, GIB = 2 ** 30;
const WIDTH = 640, HEIGHT = 300;
const LEFT = 52, RIGHT = 10, TOP = 26, BOTTOM = 40;

/** An SVG element with attributes and children; a string among these is text. */
function draw(name, attributes = {}, ...children) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
}

/** A round step, 1, 2 or 5 times a power of ten, of which `ticks` or so reach to `top`. */
export function stepTo(top, ticks) {
    const power = 10 ** Math.floor(Math.log10(top / ticks));
    return [1, 2, 5, 10].map((times) => times * power).find((step) => step * ticks >= top * 0.9999) ?? 10 * power;
}

function samplesOf(report) {
    return [[0, 0], ...report.timeline.filter(([at]) => at <= report.seconds)];
}

function highest(report) {
    return Math.max(report.peak, report.eager, ...report.timeline.map(([, size]) => size), 1);
}

/** Points and areas of a report between the given edges; `top` is the value, in bytes, of the upper one. */
function shape(report, top, left, right, upper, lower) {
    const x = (at) => left + ((right - left) * at) / Math.max(report.seconds, 1e-9);
    const y = (size) => lower - ((lower - upper) * size) / top;
    const points = samplesOf(report).map(([at, size]) => `${x(at).toFixed(1)},${y(size).toFixed(1)}`);
    const end = points.at(-1).split(",")[0];
    return { x, y, line: points.join(" "), area: `${left},${lower} ${points.join(" ")} ${end},${lower}` };
}

function level(y, left, right, kind) {
    return draw("line", { x1: left, x2: right, y1: y, y2: y, class: `patchconv-level patchconv-${kind}` });
}

/** The small one: no words, for the eye only. */
export function spark(report) {
    const [width, height] = [60, 38];
    const { y, line, area } = shape(report, 1.05 * highest(report), 0, width, 0, height);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, class: "patchconv-spark", "aria-hidden": "true" });
    svg.append(draw("polygon", { points: area, class: "patchconv-area" }));
    svg.append(draw("polyline", { points: line, class: "patchconv-line" }));
    if (report.eager) svg.append(level(y(report.eager), 0, width, "eager"));
    return svg;
}

/** The large one, with axes, the peak and what the same work was counted to need without Patch Conv; `id` is unique in the page. */
export function chart(report, id) {
    const most = highest(report);
    const [unit, name] = most >= GIB ? [GIB, "GiB"] : [MIB, "MiB"];
    const step = stepTo((1.04 * most) / unit, 5);
    const count = Math.ceil((1.04 * most) / unit / step);
    const [right, lower] = [WIDTH - RIGHT, HEIGHT - BOTTOM];
    const { x, y, line, area } = shape(report, count * step * unit, LEFT, right, TOP, lower);

    const svg = draw(
        "svg",
        { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "patchconv-chart", role: "img" },
        draw("title", { id: `${id}-title` }, `Memory over time: ${report.part}`),
        draw("desc", { id: `${id}-desc` }, report.line),
    );
    svg.setAttribute("aria-labelledby", `${id}-title ${id}-desc`);
    const write = (words, at, height, anchor, kind = "") =>
        svg.append(draw("text", { x: at, y: height, "text-anchor": anchor, class: kind }, words));

    write(`Memory (${name})`, 0, 12, "start");
    for (let number = 0; number <= count; number++) {
        const height = y(number * step * unit);
        svg.append(draw("line", { x1: LEFT, x2: right, y1: height, y2: height, class: "patchconv-grid" }));
        write(String(Number((number * step).toPrecision(6))), LEFT - 8, height + 4, "end");
    }
    const seconds = stepTo(Math.max(report.seconds, 1e-3), 6);
    for (let number = 0; number * seconds <= report.seconds; number++)
        write(String(Number((number * seconds).toPrecision(6))), x(number * seconds), lower + 17, "middle");
    write("Time (s)", right, HEIGHT - 6, "end");

    svg.append(draw("polygon", { points: area, class: "patchconv-area" }));
    svg.append(draw("polyline", { points: line, class: "patchconv-line" }));
    for (const kind of ["eager", "peak"]) {
        if (!report[kind]) continue;
        const height = y(report[kind]);
        const above = report[kind] >= Math.max(report.eager, report.peak);
        svg.append(level(height, LEFT, right, kind));
        write(report.words[kind], right - 4, above ? height - 6 : height + 15, "end", `patchconv-${kind}`);
    }
    return svg;
}
