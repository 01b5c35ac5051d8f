(() => {                                 // a word that is clicked is played; what is played is shown
  const follow = audio => {
    const answer = audio.closest(".answer");
    if (!answer) return;
    const words = answer.querySelectorAll("[data-from]"), head = answer.querySelector(".wave hr");
    const step = () => {
      const at = audio.currentTime;
      if (at >= audio.until) audio.pause();
      if (head) head.style.left = `${100 * at / audio.duration}%`;
      words.forEach(w => w.classList.toggle("now", !audio.paused && at >= w.dataset.from && at < w.dataset.to));
      if (audio.paused) audio.until = Infinity; else requestAnimationFrame(step);
    };
    step();
  };
  document.addEventListener("play", e => follow(e.target), true);
  document.addEventListener("click", e => {
    const word = e.target.closest?.("[data-from]");
    if (!word) return;
    const audio = word.closest(".answer").querySelector("audio");
    audio.currentTime = word.dataset.from;
    audio.until = Number(word.dataset.to);
    audio.play();
  });
})();
