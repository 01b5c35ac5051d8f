"use strict";
(async () => {                          // one utterance at a time: heard, labelled, saved
  const $ = id => document.getElementById(id), audio = new Audio(), RATES = [.5, .6, .75, 1, 1.25, 1.5];
  let corpus, item, words = [], current = 0, emotion = null, unsure = false, span = null, busy = false;
  let began = 0, away = 0, left = 0;    // ms: when it was shown, how long the page was hidden since, when it was hidden

  const say = text => { $("message").textContent = text; $("message").hidden = !text; };
  const press = (button, on) => button.setAttribute("aria-pressed", on);
  const ask = async (path, said) => {
    const post = said && {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(said)};
    const answer = await fetch(path, post).catch(() => null);
    if (!answer) throw Error("prosody-ser annotate does not answer: start it again. All that was saved is in the file.");
    if (answer.ok) return answer;
    throw Error((await answer.json().catch(() => ({}))).error ?? `${answer.status} ${answer.statusText}`);
  };
  const act = job => async () => {      // one thing after the other; what goes wrong is said
    if (busy) return;
    busy = true;
    say("");
    try { await job(); } catch (e) { say(e.message); } finally { busy = false; }
  };

  const make = (kind, text) => Object.assign(document.createElement("button"), {className: kind, textContent: text});
  const choose = k => {
    emotion = corpus.emotions[k] ?? emotion;
    [...$("emotions").children].forEach((b, i) => press(b, corpus.emotions[i] === emotion));
  };
  const mark = k => {
    if (!words[k]) return;
    words[k].mark = 1 - words[k].mark;
    press($("words").children[k].firstChild, words[k].mark === 1);
    draw();
  };
  const point = (k, focus) => {
    current = Math.max(0, Math.min(k, words.length - 1));
    [...$("words").children].forEach((w, i) => w.classList.toggle("current", i === current));
    if (focus) $("words").children[current]?.firstChild.focus();
  };
  const retell = texts => {             // words that stay keep their mark and their time: the longest common part
    const old = words, n = old.length, m = texts.length;
    const common = Array.from({length: n + 1}, () => new Array(m + 1).fill(0));
    for (let i = n; i--;) for (let j = m; j--;)
      common[i][j] = old[i].text === texts[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    words = [];
    for (let i = 0, j = 0; j < m;) {
      if (i < n && old[i].text === texts[j]) { words.push(old[i++]); j++; }
      else if (i < n && common[i + 1][j] >= common[i][j + 1]) i++;
      else words.push({text: texts[j++], time: null, mark: 0});
    }
  };
  const build = () => {
    $("words").replaceChildren(...words.map((w, k) => {
      const box = document.createElement("div"), word = make("toggle", w.text), again = make("again", "↻");
      box.className = "said";
      box.append(word, again);
      press(word, w.mark === 1);
      word.onclick = () => { point(k); mark(k); };
      word.onfocus = () => point(k);
      again.tabIndex = -1;
      again.title = w.time ? "this word again and again" : "when it is said is not known: plays all";
      again.onclick = () => { point(k); repeat(); };
      return box;
    }));
    $("untimed").hidden = !words.length || words.some(w => w.time);
    point(current);
    draw();
  };

  const draw = () => {
    const canvas = $("wave"), g = canvas.getContext("2d"), scale = devicePixelRatio, {peaks = [], seconds = 1} = item ?? {};
    const [w, h] = [canvas.clientWidth, canvas.clientHeight], x = w / seconds, bar = w / peaks.length;
    canvas.width = w * scale;
    canvas.height = h * scale;
    g.scale(scale, scale);
    const ink = getComputedStyle(canvas).color;
    words.forEach((word, k) => {
      if (!word.time) return;
      g.globalAlpha = word.mark ? .45 : k === current ? .16 : .07;
      g.fillStyle = word.mark ? "#f3a64f" : ink;
      g.fillRect(x * word.time[0], 0, x * (word.time[1] - word.time[0]) - 1, h);
    });
    g.globalAlpha = .65;
    g.fillStyle = ink;
    peaks.forEach((p, i) => g.fillRect(i * bar, h / 2 * (1 - p / 100), Math.max(bar, .5), Math.max(1, h * p / 100)));
    g.globalAlpha = 1;
    g.fillStyle = "#2f7fd6";
    g.fillRect(x * audio.currentTime - 1, 0, 2, h);
  };
  const follow = () => {
    if (span && audio.currentTime >= span[1]) audio.currentTime = span[0];
    draw();
    if (!audio.paused) requestAnimationFrame(follow);
  };
  const start = () => audio.play().catch(() => {});     // there is nothing to play, or it is gone
  audio.onplay = follow;
  const play = () => {
    if (!audio.paused) { span = null; return audio.pause(); }
    if (span) audio.currentTime = 0;
    span = null;
    return start();
  };
  const repeat = () => {                // a word whose time is known, until space; else all
    const time = words[current]?.time ?? null;
    span = time;
    audio.currentTime = time ? time[0] : 0;
    return start();
  };
  const speed = step => {
    const k = Math.max(0, Math.min(RATES.indexOf(audio.defaultPlaybackRate) + step, RATES.length - 1));
    audio.playbackRate = audio.defaultPlaybackRate = RATES[k];
    $("rate").textContent = `${RATES[k]} ×`;
  };

  const count = ({done, total, pace}) => {
    Object.assign($("bar"), {max: total, value: done});
    const place = item && !item.finished ? `${item.index + 1} of ${total}; ` : "";
    $("progress").textContent = `${corpus.annotator}: ${place}${done} done` + (pace ? `, ${Math.round(pace)} an hour` : "");
  };
  const show = async index => {
    const found = await (await ask(`items/${index}`)).json();
    const sound = found.finished || found.problem ? null : await (await ask(`sound/${index}`)).blob();
    audio.pause();
    URL.revokeObjectURL(audio.src);
    if (sound) audio.src = URL.createObjectURL(sound); else audio.removeAttribute("src");
    [item, span, current, emotion, began, away] = [found, null, 0, null, performance.now(), 0];
    $("work").hidden = !!found.finished;
    words = (found.words ?? []).map((text, k) => ({text, time: found.times?.[k] ?? null, mark: 0}));
    const filled = found.given ?? found.suggested ?? {};
    if (filled.words) retell(filled.words);
    (filled.prosody_annotations ?? []).forEach((m, k) => { words[k].mark = m; });
    unsure = !!filled.unsure;
    press($("unsure"), unsure);
    choose(corpus.emotions.indexOf(filled.emotion));
    edit(false);
    $("suggests").hidden = !found.suggested;
    count(found);
    if (found.finished) say("All done. Thank you! z brings back the last one.");
    if (found.problem) say(`This recording cannot be heard: ${found.problem} Skip it (s).`);
    $("work").dataset.index = index;
  };
  const save = async skipped => {
    if (item.finished) return;
    if (!$("transcript").hidden) close(true);
    if (item.problem && !skipped) throw Error(`This recording cannot be heard: ${item.problem} Skip it (s).`);
    const seconds = Math.round((performance.now() - began - away) / 100) / 10;
    const marks = words.map(w => w.mark), texts = words.map(w => w.text);
    const said = {words: texts, prosody_annotations: marks, emotion, unsure, skipped, seconds};
    await show((await (await ask(`items/${item.index}`, said)).json()).next);
  };
  const back = async () => item.index ? show(item.index - 1) : say("This is the first one.");

  const edit = open => {
    $("transcript").hidden = !open;
    $("words").hidden = open;
    if (!open) {
      $("text").blur();
      return build();
    }
    $("text").value = words.map(w => w.text).join(" ");
    $("text").focus();
  };
  const close = keep => {
    if (keep) retell($("text").value.split(/\s+/).filter(Boolean));
    edit(false);
  };
  $("transcript").onsubmit = e => { e.preventDefault(); close(true); };
  $("text").onkeydown = e => { if (e.key === "Escape") close(false); };

  const jobs = {play, slower: () => speed(-1), faster: () => speed(1), loop: repeat, edit: () => edit(true), next: act(() => save(false)),
    unsure: () => { unsure = !unsure; press($("unsure"), unsure); }, skip: act(() => save(true)), undo: act(back)};
  const keys = {" ": "play", "-": "slower", "+": "faster", "=": "faster", l: "loop", e: "edit", n: "next", u: "unsure", s: "skip", z: "undo"};
  for (const [id, job] of Object.entries(jobs)) $(id).onclick = job;
  $("wave").onclick = e => {
    span = null;
    audio.currentTime = item.seconds * e.offsetX / $("wave").clientWidth;
    start();
  };
  document.addEventListener("keydown", e => {
    if (e.ctrlKey || e.metaKey || e.altKey || e.target.id === "text" || !item) return;
    const key = e.key.toLowerCase(), number = "1234567890".indexOf(key);
    if (key === "enter" && e.target.closest("button:not(.toggle), summary")) return;     // the button's own
    if (key === "enter") mark(current);
    else if (key === "arrowleft" || key === "arrowright") point(current + (key === "arrowleft" ? -1 : 1), true);
    else if (key.length === 1 && number >= 0) choose(number);
    else if (keys[key]) { if (!e.repeat) jobs[keys[key]](); }
    else return;
    e.preventDefault();
    if (key.startsWith("arrow")) draw();
  });
  document.addEventListener("keyup", e => { if (e.key === " " && e.target.closest("button")) e.preventDefault(); });
  document.addEventListener("click", e => { if (e.detail) e.target.closest("button:not(.toggle)")?.blur(); });
  document.addEventListener("visibilitychange", () => {      // who goes away is not working
    if (document.hidden) left = performance.now(); else away += performance.now() - Math.max(left, began);
  });
  addEventListener("resize", draw);

  await act(async () => {
    corpus = await (await ask("items")).json();
    document.title = `Annotate: ${corpus.annotator}`;
    $("feeling").hidden = !corpus.emotions.length;
    $("emotions").replaceChildren(...corpus.emotions.map((name, k) => {
      const button = make("", ` ${name}`), key = document.createElement("kbd");
      key.textContent = (k + 1) % 10;
      if (k < 10) button.prepend(key);
      button.onclick = () => choose(k);
      return button;
    }));
    await show(corpus.next);
  })();
})();
